"""Bits by need: which matrices get the finer scheme when not all can, decided greedily from what each was measured to lose.

Every matrix begins with the cheapest scheme. Then, again and again, the step to a finer one that removes most damage per added bit is
taken, as long as it fits the budget. Without interaction between matrices that is the best choice up to the last step (the damages of a
matrix fall convexly with its bits, so no step hides a better one behind it).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ernie45.errors import ConfigError
from ernie45.quant.spec import QuantSpec, Rule, Scheme


@dataclass(frozen=True)
class Need:
    """One matrix or stack of experts: its elements, inputs per row, and the damage under each scheme, by the scheme's word."""

    name: str
    elements: int
    in_size: int
    damage: Mapping[str, float]

    def bits(self, word: str) -> float:
        """Bits of the whole under a scheme, scales included."""
        return self.elements * Scheme.parse(word).bits_per_weight(self.in_size)


def allocate(needs: Sequence[Need], budget_bits: float) -> dict[str, str]:
    """Name -> scheme's word, of at most `budget_bits` together.

    Raises `ConfigError`, with both numbers, when even the cheapest schemes need more.
    """
    chosen = {need.name: min(need.damage, key=need.bits) for need in needs}
    used = sum(need.bits(chosen[need.name]) for need in needs)
    elements = sum(need.elements for need in needs)
    if used > budget_bits:
        raise ConfigError(
            f"{budget_bits / elements:.3f} bits a weight are asked for, and the cheapest schemes need {used / elements:.3f}; "
            "ask for more, or take a larger group"
        )
    while True:
        steps = [
            (gain / cost, need.name, word, cost)
            for need in needs
            for word in need.damage
            if (cost := need.bits(word) - need.bits(chosen[need.name])) > 0
            and used + cost <= budget_bits
            and (gain := need.damage[chosen[need.name]] - need.damage[word]) > 0
        ]
        if not steps:
            return chosen
        _, name, word, cost = max(steps)
        chosen[name] = word
        used += cost


def spec_from(chosen: Mapping[str, str], rest: QuantSpec) -> QuantSpec:
    """The choice as rules, before the rules of `rest` for everything that was not measured."""
    return QuantSpec(rules=(*(Rule(pattern=name, scheme=word) for name, word in sorted(chosen.items())), *rest.rules))
