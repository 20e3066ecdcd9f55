"""Bits by need against every possible choice."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ConfigError
from ernie45.quant.allocate import Need, allocate, spec_from
from ernie45.quant.spec import QuantSpec, Rule

WORDS = ("w4a8-g64", "w8a8-g64")


def need(name: str, elements: int, coarse: float, fine: float) -> Need:
    return Need(name, elements, 64, {WORDS[0]: coarse, WORDS[1]: fine})


def test_the_neediest_is_served_first() -> None:
    needs = [need("a", 100, 1.0, 0.1), need("b", 100, 5.0, 0.1), need("c", 100, 2.0, 0.1)]
    # 4.25 bits each, 4 more for every finer one
    assert allocate(needs, 4.25 * 300 + 400) == {"a": WORDS[0], "b": WORDS[1], "c": WORDS[0]}
    assert allocate(needs, 4.25 * 300 + 800) == {"a": WORDS[0], "b": WORDS[1], "c": WORDS[1]}
    assert set(allocate(needs, 1e9).values()) == {WORDS[1]}
    assert set(allocate(needs, 4.25 * 300).values()) == {WORDS[0]}


def test_damage_counts_by_size() -> None:
    needs = [need("large", 1000, 3.0, 0.0), need("small", 10, 1.0, 0.0)]
    assert allocate(needs, 4.25 * 1010 + 100) == {"large": WORDS[0], "small": WORDS[1]}


def test_too_small_a_budget_is_told() -> None:
    with pytest.raises(ConfigError, match=r"3\.000 bits a weight.*need 4\.250"):
        allocate([need("a", 100, 1.0, 0.1)], 300)


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 0.09)), min_size=1, max_size=7), st.floats(4.25, 8.3)
)  # equal sizes: then greedy is the best choice, and brute force must agree
def test_equal_sizes_against_brute_force(damages, bits: float) -> None:
    needs = [need(str(i), 64, coarse, fine) for i, (coarse, fine) in enumerate(damages)]
    budget = bits * 64 * len(needs)

    def damage(words) -> float:
        return sum(n.damage[w] for n, w in zip(needs, words, strict=True))

    fitting = [
        words
        for words in itertools.product(WORDS, repeat=len(needs))
        if sum(n.bits(w) for n, w in zip(needs, words, strict=True)) <= budget
    ]
    found = allocate(needs, budget)
    assert damage([found[n.name] for n in needs]) == pytest.approx(min(map(damage, fitting)))


def test_the_choice_comes_before_the_other_rules() -> None:
    spec = spec_from({"layers.0.attn.out": WORDS[1]}, QuantSpec(rules=(Rule(pattern="*", scheme=WORDS[0]),)))
    assert str(spec.scheme_for("layers.0.attn.out")) == WORDS[1]
    assert str(spec.scheme_for("layers.1.attn.out")) == WORDS[0]
