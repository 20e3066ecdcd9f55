"""Floating-point operations of a training step, counted for the parameters that a token really meets.

A product with a matrix of N numbers costs a token 2 N in the forward pass and 2 N for the gradient of its input; the gradient of the matrix
costs 2 N more where it learns. Of a mixture of experts only the chosen ones count, of the head only rows with a label, of attention only
pairs of tokens that see each other: 4 Q operations a pair and layer forward (Q the width of all query heads), twice that backward. Norms,
softmax and sorting are left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ernie45.models.config import TextConfig
from ernie45.models.counts import count_parameters
from ernie45.models.vision_config import VisionConfig


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a step learned from, of all ranks: tokens, pairs of tokens that see each other, rows with a label, and of the predictor.

    Of its pictures: tokens that go to the vision experts, patches, and pairs of patches that see each other.
    """

    tokens: int
    pairs: int
    head_rows: int
    mtp_rows: int = 0
    vision_tokens: int = 0
    patches: int = 0
    patch_pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How many products a matrix costs: 3 where it learns, 2 where gradients only go through it, 1 where none do."""

    text: int = 3
    vision_experts: int = 3
    sight: int = 3

    @classmethod
    def of(cls, names: Iterable[str]) -> "Passes":
        """From the names of the parameters that learn; adapters are too small to count."""
        names = list(names)
        whole = [name for name in names if not name.endswith((".adapter_a", ".adapter_b"))]

        def learns(group: Iterable[str], part: str) -> bool:
            return any(_part(name) == part for name in group)

        return cls(
            text=3 if learns(whole, "text") else 2,
            vision_experts=3 if learns(whole, "vision_experts") else 2,
            sight=3 if learns(whole, "sight") else 2 if learns(names, "sight") else 1,
        )


def _part(name: str) -> str:
    return "sight" if name.startswith("sight.") else "vision_experts" if ".ffn.vision." in name else "text"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations: of the step, and of one forward pass of the layers in it, which is what computing them again costs at most.

    (torch may leave out the last product of what it computes again, when backward does not need its result.)
    """

    step: float
    layers: float


def causal_pairs(lengths: Sequence[int]) -> int:
    """Pairs (token, earlier token or itself) of documents of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def step_work(config: TextConfig, step: Learned, vision: VisionConfig | None = None, passes: Passes | None = None) -> Work:
    """The work of one step; by default all matrices learn."""
    passes = passes or Passes()
    counts = count_parameters(config, vision)
    # a seen token meets all that a text token meets, but as many vision experts in place of the text ones
    replaced, met = _experts_met(config, vision)
    matrices = 2 * ((counts.active - counts.norms) * step.tokens - replaced * step.vision_tokens)
    vision_experts = 2 * met * step.vision_tokens
    attention = 4 * config.query_size * config.num_layers * step.pairs
    head = 2 * config.vocab_size * config.hidden_size * (step.head_rows + step.mtp_rows)
    block = 2 * counts.mtp * step.tokens if step.mtp_rows else 0
    seen = 4 * config.query_size * step.pairs if step.mtp_rows else 0
    language = passes.text * (matrices + head + block) + passes.vision_experts * vision_experts + 3 * (attention + seen)
    sight = _sight_work(config, vision, step, passes.sight) if vision is not None else 0
    return Work(step=float(language + sight), layers=float(matrices + vision_experts + attention))


Compares = Literal["policy", "with reference", "rewards"]
"""What a step over compared answers computes: the policy alone, a reference's pass beside it, or rewards without a head over words."""


def comparison_work(config: TextConfig, vision: VisionConfig | None, passes: Passes, compares: Compares, step: Learned) -> Work:
    """The work of one step over compared answers; the pass of a reference counts, since the method needs it."""
    if compares == "rewards":
        step = replace(step, head_rows=0)
    policy = step_work(config, step, vision, passes)
    if compares != "with reference":
        return policy
    once = Passes(text=1, vision_experts=1, sight=1)
    whole = step_work(config, step, vision, once).step
    attention = 2 * 4 * config.query_size * config.num_layers * step.pairs  # of the three passes that a step has, a reference has one
    return replace(policy, step=policy.step + whole - attention)


def _experts_met(config: TextConfig, vision: VisionConfig | None) -> tuple[int, int]:
    """Numbers of the text experts that a text token meets in all layers, and of the vision experts that a seen token meets."""
    e = config.experts
    if e is None or vision is None:
        return 0, 0
    chosen = 3 * config.hidden_size * e.top_k * sum(config.is_expert_layer(i) for i in range(config.num_layers))
    return chosen * e.expert_size, chosen * vision.expert_size


def _sight_work(config: TextConfig, vision: VisionConfig, step: Learned, passes: int) -> int:
    """Tower and resampler, without biases; the markers around pictures are counted as if they were tokens of pictures."""
    v, wide = vision, vision.joined_size
    patch = v.patch_values * v.size + v.depth * (4 * v.size**2 + 2 * v.size * v.ffn_size)
    spatial = 2 * wide**2 * step.patches // v.merge**2
    temporal = (3 * wide**2 + wide * config.hidden_size) * step.vision_tokens
    attention = 4 * v.size * v.depth * step.patch_pairs
    return passes * 2 * (patch * step.patches + spatial + temporal) + (3 if passes > 1 else 1) * attention
