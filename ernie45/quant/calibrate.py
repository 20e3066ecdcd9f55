"""Calibration: what the inputs of one block's matrices look like, gathered while sequences pass through it.

Two copies of a block are watched together: the one being quantised, whose inputs carry the errors made so far, and the original with its
own inputs. A matrix can then be fitted to give, from the inputs it will really see, the outputs it should have given (GPTAQ, Li et al.
2025, arXiv 2504.02692). Any module tree made of `Linear` and `Experts` can be watched. Nothing of the inputs is kept but Gram matrices,
mean magnitudes and counts. Routed experts are counted one by one: an expert that saw too few tokens is calibrated on all of them.

Sequences may hold pictures: `seen` then says which tokens go to the experts for what is seen, and each sequence has turns of its own.

Letters: S sequences, L their length, T tokens, R some of them, D width, I in-width, F width of one expert, P rotary pairs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ernie45 import ops
from ernie45.errors import CheckpointError
from ernie45.nn.attention import PackedCausal
from ernie45.nn.layers import Linear
from ernie45.nn.moe import Experts, Modality

_FOR_SEEN, _FOR_TEXT = "ffn.vision.", "ffn.experts"
"""Parts of a block that text never reaches, the experts for what is seen, and the part that only text reaches."""
_INPUTS_KEPT = 256
SEQUENCES_AT_ONCE = 2  # bounds the memory of a pass: a few hundred megabytes for the widest published layer


class InputStatistics:
    """Of the inputs x one matrix saw, and x' of the original: sum x x^T, sum x' x^T (float32 [I, I]), sum and largest of |x| [I], count."""

    def __init__(self, size: int) -> None:
        self.gram_II = torch.zeros(size, size)
        self.cross_II = torch.zeros(size, size)
        self.magnitude_I, self.largest_I = torch.zeros(size), torch.zeros(size)
        self.kept_SI = torch.zeros(0, size)
        """Some of the inputs themselves, evenly spread over the first sequences."""
        self.tokens = 0

    def add(self, x_TI: Tensor, original_TI: Tensor, weights_T: Tensor, where: str) -> None:
        """Take in T inputs, each counting by its weight.

        Raises `CheckpointError` for one that is no finite number: a model that overflows cannot be calibrated.
        """
        x_TI, original_TI = x_TI.float(), original_TI.float()
        if not bool(x_TI.isfinite().all()):
            raise CheckpointError(f"the inputs of '{where}' hold NaN or infinities on the calibration text; the checkpoint is damaged")
        weighted_TI = x_TI * weights_T[:, None]
        self.gram_II.addmm_(x_TI.t(), weighted_TI)
        self.cross_II.addmm_(original_TI.t(), weighted_TI)
        self.magnitude_I += x_TI.abs().sum(0)
        if len(x_TI):
            self.largest_I = torch.maximum(self.largest_I, x_TI.abs().amax(0))
        if len(self.kept_SI) < _INPUTS_KEPT:
            some_SI = x_TI[:: max(1, len(x_TI) * 4 // _INPUTS_KEPT)]
            self.kept_SI = torch.cat((self.kept_SI, some_SI))[:_INPUTS_KEPT]
        self.tokens += len(x_TI)

    def mean_magnitude(self) -> Tensor:
        """Mean |x| per input, [I]."""
        return self.magnitude_I / max(1, self.tokens)

    def narrowed(self, factors_I: Tensor) -> "InputStatistics":
        """The statistics of x / s and x' / s."""
        result = InputStatistics(0)
        both_II = torch.outer(factors_I, factors_I)
        result.gram_II, result.cross_II = self.gram_II / both_II, self.cross_II / both_II
        result.magnitude_I, result.tokens = self.magnitude_I / factors_I, self.tokens
        result.largest_I, result.kept_SI = self.largest_I / factors_I, self.kept_SI / factors_I
        return result


class ExpertStatistics:
    """What each expert of a layer saw: inputs of its gate|up and of its down, and how many tokens were routed to it."""

    def __init__(self, experts: Experts, least: int) -> None:
        """`least`: an expert with fewer routed tokens is calibrated on all tokens."""
        count, size, inner = experts.down.shape
        self.routed = [0] * count
        self.least = least
        self.everything = InputStatistics(size)
        self.gate_up = [InputStatistics(size) for _ in range(count)]
        self.down = [InputStatistics(inner) for _ in range(count)]

    def starved(self) -> tuple[int, ...]:
        """Experts that saw fewer than `least` tokens of their own."""
        return tuple(e for e, tokens in enumerate(self.routed) if tokens < self.least)

    def add(self, now: "Seen", before: "Seen", weights_T: Tensor, where: str) -> None:
        """Give every token to the experts it is routed to now."""
        assert now.chosen is not None
        self.everything.add(now.x_TI, before.x_TI, weights_T, where)
        for e in now.chosen.unique().tolist():
            rows = (now.chosen == e).any(1)
            self.routed[e] += int(rows.sum())
            self.gate_up[e].add(now.x_TI[rows], before.x_TI[rows], weights_T[rows], f"{where}.gate_up.{e}")
            self.down[e].add(_inner(now, e, rows), _inner(before, e, rows), weights_T[rows], f"{where}.down.{e}")

    def begin_again_for_starved(self) -> None:
        """Starved experts share the Gram matrix of all tokens; their inner inputs are gathered anew by `add_to_starved`."""
        for e in self.starved():
            self.gate_up[e] = self.everything
            self.down[e] = InputStatistics(len(self.down[e].magnitude_I))

    def add_to_starved(self, now: "Seen", before: "Seen", weights_T: Tensor, where: str) -> None:
        """Give every token to the starved experts' inner inputs."""
        rows = torch.ones(len(now.x_TI), dtype=torch.bool)
        for e in self.starved():
            self.down[e].add(_inner(now, e, rows), _inner(before, e, rows), weights_T, f"{where}.down.{e}")


Statistics = dict[str, InputStatistics | ExpertStatistics]
"""Module name within the block -> what it saw."""


@dataclass(frozen=True)
class Seen:
    """One input of a watched module: [T, I], and for experts the module and the chosen ones [T, C].

    `rows_R` are the tokens of the pass that came here; None: all of them.
    """

    x_TI: Tensor
    module: nn.Module
    chosen: Tensor | None = None
    rows_R: Tensor | None = None

    def some(self, weights_T: Tensor) -> Tensor:
        """Of the weights of the pass those of the tokens that came here."""
        return weights_T if self.rows_R is None else weights_T[self.rows_R]


@dataclass(frozen=True)
class Pair:
    """A block with the hidden states [S, L, D] that enter it, and what its modules received in the original model, pass by pass.

    `turns` are [L, P] of all sequences, or [S, L, P]. `weights_SL` says how much a token counts; None: all the same. Without `originals`
    the block is the original itself. `seen_SL` says which tokens are seen ones, bool; None: all are text.
    """

    now: nn.Module
    now_SLD: Tensor
    turns: Tensor
    originals: "Sequence[Mapping[str, Seen]] | None" = None
    weights_SL: Tensor | None = None
    seen_SL: Tensor | None = None

    @torch.inference_mode()
    def observe(self, names: Collection[str], least_tokens: int) -> Statistics:
        """What the modules `names` see, from one pass of all sequences; experts that saw fewer than `least_tokens` from a second one."""
        statistics: Statistics = {}
        for name in names:
            module = self.now.get_submodule(name)
            if isinstance(module, Experts):
                statistics[name] = ExpertStatistics(module, least_tokens)
            else:
                assert isinstance(module, Linear)
                statistics[name] = InputStatistics(module.weight.shape[1])
        for now, before, weights_T in self._inputs(names):
            for name, here in now.items():
                found = statistics[name]
                if isinstance(found, ExpertStatistics):
                    found.add(here, before[name], here.some(weights_T), name)
                else:
                    found.add(here.x_TI, before[name].x_TI, here.some(weights_T), name)
        starving = {name: found for name, found in statistics.items() if isinstance(found, ExpertStatistics) and found.starved()}
        for found in starving.values():
            found.begin_again_for_starved()
        for now, before, weights_T in self._inputs(starving) if starving else ():
            for name, here in now.items():
                starving[name].add_to_starved(here, before[name], here.some(weights_T), name)
        return statistics

    def _inputs(self, names: Collection[str]) -> Iterator[tuple[Mapping[str, Seen], Mapping[str, Seen], Tensor]]:
        weights_SL = torch.ones(self.now_SLD.shape[:2]) if self.weights_SL is None else self.weights_SL
        for number, part in enumerate(_parts(self.now_SLD)):
            now = inputs_of(self.now, names, self.now_SLD[part], _of(self.turns, part), _seen(self.seen_SL, part))
            yield now, now if self.originals is None else self.originals[number], weights_SL[part].flatten()


@torch.inference_mode()
def original_inputs(
    block: nn.Module, names: Collection[str], x_SLD: Tensor, turns: Tensor, seen_SL: Tensor | None = None
) -> "list[dict[str, Seen]]":
    """What the modules `names` of the original block receive, all of it kept: one pass serves every matrix of the block."""
    return [inputs_of(block, names, x_SLD[part], _of(turns, part), _seen(seen_SL, part)) for part in _parts(x_SLD)]


def _parts(x_SLD: Tensor) -> Iterator[slice]:
    return (slice(begin, begin + SEQUENCES_AT_ONCE) for begin in range(0, len(x_SLD), SEQUENCES_AT_ONCE))


def _of(turns: Tensor, part: slice) -> Tensor:
    return turns if turns.dim() == 2 else turns[part]


def _seen(seen_SL: Tensor | None, part: slice) -> Tensor | None:
    return None if seen_SL is None else seen_SL[part]


def token_weights(after_SLD: Tensor) -> Tensor:
    """How much an error at each token counts, [S, L], mean 1: one over the energy of the hidden state it is added to.

    What follows normalises that state, so only the relative error matters; unweighted, the few tokens whose state grows a thousandfold
    ("massive activations", Sun et al. 2024, arXiv 2402.17762) would be all that a matrix is fitted to.
    """
    weights_SL = 1 / after_SLD.square().mean(-1).clamp(min=1e-30)
    return weights_SL / weights_SL.mean()


def reached(name: str, seen_SL: Tensor | None) -> bool:
    """Whether some of the tokens pass the module `name` of a block; `seen` is None where all are text."""
    if name.startswith(_FOR_SEEN):
        return seen_SL is not None and bool(seen_SL.any())
    return name != _FOR_TEXT or seen_SL is None or not bool(seen_SL.all())


class _Enough(Exception):
    """No error: it ends a pass whose rest nobody needs."""


def inputs_of(block: nn.Module, names: Collection[str], x_SLD: Tensor, turns: Tensor, seen_SL: Tensor | None = None) -> dict[str, Seen]:
    """What those of the modules `names` receive that the sequences reach; the pass ends where the last of them is."""
    names = [name for name in names if reached(name, seen_SL)]
    seen: dict[str, Seen] = {}
    if not names:
        return seen
    modality = _modality(seen_SL)

    def watching(name: str) -> Callable[..., None]:
        rows_R = None
        if modality is not None and isinstance(block.get_submodule(name), Experts):
            rows_R = modality.vision_R if name.startswith(_FOR_SEEN) else modality.text_R

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            chosen = inputs[1].experts if isinstance(module, Experts) else None  # pyrefly: ignore[missing-attribute]
            seen[name] = Seen(inputs[0], module, chosen, rows_R)
            if len(seen) == len(names):
                raise _Enough

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(watching(name)) for name in names]
    try:
        _through(block, x_SLD, turns, modality)
    except _Enough:
        return seen
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError(f"of {sorted(names)} only {sorted(seen)} were reached")


def _inner(seen: Seen, expert: int, rows: Tensor) -> Tensor:
    assert isinstance(seen.module, Experts)
    return ops.swiglu(ops.linear(seen.x_TI[rows], seen.module.gate_up[expert]))


def _modality(seen_SL: Tensor | None) -> Modality | None:
    return None if seen_SL is None else Modality.of(seen_SL.flatten())


def _through(block: nn.Module, x_SLD: Tensor, turns: Tensor, modality: Modality | None) -> Tensor:
    count, length, _ = x_SLD.shape
    attend = PackedCausal([length * (i + 1) for i in range(count)])
    turns_TP = turns.repeat(count, 1) if turns.dim() == 2 else turns.flatten(0, 1)
    return block(x_SLD.flatten(0, 1), turns_TP, attend, *([] if modality is None else [modality])).view_as(x_SLD)


@torch.inference_mode()
def advance(block: nn.Module, x_SLD: Tensor, turns: Tensor, seen_SL: Tensor | None = None) -> None:
    """Replace every sequence by the block's output for it, in place, a few at a time."""
    for part in _parts(x_SLD):
        x_SLD[part] = _through(block, x_SLD[part], _of(turns, part), _modality(_seen(seen_SL, part)))


def advance_original(block: nn.Module, x_SLD: Tensor, turns: Tensor, where: str, seen_SL: Tensor | None = None) -> None:
    """`advance` for a block of the original model, called `where`.

    Raises `CheckpointError` when a hidden state then has no finite energy: everything measured against it would be NaN.
    """
    advance(block, x_SLD, turns, seen_SL)
    if not bool(x_SLD.square().sum(dtype=torch.float64).isfinite()):
        raise CheckpointError(
            f"'{where}' gives NaN, infinities or values too large to square on plain text; the checkpoint is damaged, download it again"
        )
