"""One block quantised: matrices widened (AWQ, SmoothQuant), rounded (to nearest, or GPTQ) by what they saw, packed modules in their place.

Works on any `nn.Block`: dense, or a mixture of experts whose routed experts share one set of factors, since one norm feeds them all. The
function of the float block does not change when it is widened; routers stay in float32 and take their share of the factors.

Letters: D width, F feed-forward width, I in-width.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ernie45.errors import ConfigError, did_you_mean
from ernie45.nn.attention import Attention
from ernie45.nn.block import Block
from ernie45.nn.layers import Linear, RMSNorm, SwiGLU
from ernie45.nn.moe import Experts, MixtureOfExperts
from ernie45.ops import PackedWeight
from ernie45.ops.codes import CodedWeight
from ernie45.quant import awq
from ernie45.quant.calibrate import ExpertStatistics, InputStatistics, Pair, Seen, Statistics, original_inputs, reached
from ernie45.quant.ccq import encode, feedback
from ernie45.quant.fp8 import Fp8Experts, Fp8Linear, Fp8Weight, restored_from_fp8, round_to_fp8
from ernie45.quant.gptq import GptqSettings, corrected, gptq, output_errors, restored, round_to_nearest
from ernie45.quant.hadamard import turned, turned_back, turned_gram
from ernie45.quant.linear import QuantExperts, QuantLinear
from ernie45.quant.model import prepare_model, quantisable
from ernie45.quant.pack import pack_as
from ernie45.quant.smooth import search as smooth_search
from ernie45.quant.spec import AnyScheme, Fp8Scheme, QuantSpec, Rule

AnyWeight = PackedWeight | CodedWeight | Fp8Weight
_EXPERTS_SEARCHED = 8  # so many experts, evenly spread, decide on the factors that all of them share


@dataclass(frozen=True)
class Method:
    """How a block is quantised: `widen` inputs first or not, by AWQ or by SmoothQuant (`smooth`), then `spread` rounding errors by GPTQ or
    round to nearest.
    """

    name: str
    widen: bool
    spread: bool
    gptq: GptqSettings = field(default_factory=GptqSettings)
    smooth: bool = False

    @property
    def needs_text(self) -> bool:
        """Whether inputs are looked at."""
        return self.widen or self.spread


@dataclass(frozen=True)
class Streams:
    """Hidden states [S, L, D] that enter the block on the calibration text: in the model quantised so far, and in the original.

    `turns` are [L, P] of all sequences, or [S, L, P]. `weights_SL`: how much the error at a token counts (`token_weights`). `seen_SL`:
    which tokens are seen ones; None where all are text.
    """

    now_SLD: Tensor
    original_SLD: Tensor
    turns: Tensor
    least_tokens: int
    weights_SL: Tensor | None = None
    seen_SL: Tensor | None = None

    def pair(self, now: nn.Module, originals: Sequence[Mapping[str, Seen]] | None, *, weighted: bool) -> Pair:
        """The stream of the model so far with the block it enters, beside what the original's modules received (None: the block is it)."""
        return Pair(now, self.now_SLD, self.turns, originals, self.weights_SL if weighted else None, self.seen_SL)


METHODS = {
    method.name: method
    for method in (
        Method("rtn", widen=False, spread=False),
        Method("gptq", widen=False, spread=True),
        Method("awq", widen=True, spread=False),
        Method("awq+gptq", widen=True, spread=True),
        Method("smooth", widen=True, spread=False, smooth=True),
    )
}


def method_named(name: str) -> Method:
    """Raises `ConfigError` for a name that is none."""
    if name not in METHODS:
        raise ConfigError(f"'{name}' is no quantisation method{did_you_mean(name, METHODS)}")
    return METHODS[name]


@dataclass(frozen=True)
class MatrixReport:
    """What rounding one matrix cost: `error` is the energy its outputs lost over the energy they have, on the calibration inputs.

    Without calibration (rtn) inputs count as equal and independent. `nearest_error` is what rounding to nearest would have cost, None where
    nothing else was done. For experts all are taken together; `routed` then says how many tokens each saw, `starved` which were calibrated
    on all tokens because they saw too few. `exponent` is AWQ's.
    """

    name: str
    scheme: str
    error: float
    nearest_error: float | None = None
    exponent: float | None = None
    tokens: int = 0
    routed: tuple[int, ...] = ()
    starved: tuple[int, ...] = ()


@torch.inference_mode()
def quantise_block(
    block: Block, prefix: str, schemes: Mapping[str, AnyScheme | None], method: Method, streams: Streams | None
) -> tuple[nn.Module, list[MatrixReport]]:
    """Quantise the matrices of `block` that `schemes` (by full name, `prefix` included) gives one; returns the packed block and its costs.

    `block` is used up. `streams` may be None when the method needs no text. Matrices are done in the order in which inputs pass them, so
    that a later one sees, and makes up for, what the earlier ones lost.
    """
    named = {name: schemes[f"{prefix}.{name}"] for name, _ in quantisable(block)}
    todo = {name: scheme for name, scheme in named.items() if scheme is not None}
    exponents: dict[str, float] = {}
    if method.widen and streams is not None and todo:
        passed = [name for name in named if reached(name, streams.seen_SL)]
        exponents = _widen(
            block, named, streams.pair(block, None, weighted=False).observe(passed, streams.least_tokens), smooth=method.smooth
        )
    originals: Sequence[Mapping[str, Seen]] | None = None
    if method.spread and streams is not None:
        originals = original_inputs(block, list(todo), streams.original_SLD, streams.turns, streams.seen_SL)
    reports: list[MatrixReport] = []
    packed: dict[str, object] = {}
    for stage in _stages(todo):
        statistics: Statistics = {}
        if streams is not None and all(reached(name, streams.seen_SL) for name in stage):
            # what qkv makes is read by all later tokens, whatever the token itself is worth
            statistics = streams.pair(block, originals, weighted="attn.qkv" not in stage).observe(stage, streams.least_tokens)
        for name in stage:
            module, scheme, seen = block.get_submodule(name), todo[name], statistics.get(name)
            full, exponent = f"{prefix}.{name}", exponents.get(name)
            if isinstance(module, Experts):
                assert seen is None or isinstance(seen, ExpertStatistics)
                packed[name], costs = _round_experts(module, scheme, method, seen)
                routed, starved = (tuple(seen.routed), seen.starved()) if seen else ((), ())
                reports.append(costs.report(full, scheme, method, exponent, sum(routed), routed, starved))
            else:
                assert isinstance(module, Linear)
                assert seen is None or isinstance(seen, InputStatistics)
                packed[name], costs = round_matrix(module.weight, scheme, method, seen)
                reports.append(costs.report(full, scheme, method, exponent, seen.tokens if seen else 0))
    return _filled(block, named, packed), reports


def _stages(names: Collection[str]) -> list[list[str]]:
    """Modules that see their inputs at the same time, in the order of the pass."""
    order = (("attn.qkv",), ("attn.out",), ("ffn.gate_up", "ffn.shared.gate_up", "ffn.experts"), ("ffn.down", "ffn.shared.down"))
    order += (("ffn.vision.experts",),)
    assert not set(names) - {name for stage in order for name in stage}, "a block with matrices this file does not know"
    return [found for stage in order if (found := [name for name in stage if name in names])]


@dataclass(frozen=True)
class Costs:
    """Energies of outputs: lost, lost by rounding to nearest (None: not tried), and all of it."""

    lost: float
    nearest: float | None
    energy: float

    def __add__(self, other: "Costs") -> "Costs":
        nearest = None if self.nearest is None or other.nearest is None else self.nearest + other.nearest
        return Costs(self.lost + other.lost, nearest, self.energy + other.energy)

    def report(
        self, name: str, scheme: AnyScheme, method: Method, exponent: float | None, tokens: int,
        routed: tuple[int, ...] = (), starved: tuple[int, ...] = (),
    ) -> MatrixReport:  # fmt: skip
        energy = self.energy or 1.0
        nearest = self.nearest / energy if method.needs_text and self.nearest is not None else None
        return MatrixReport(name, str(scheme), self.lost / energy, nearest, exponent, tokens, routed, starved)


def round_matrix(parameter_OI: Tensor, scheme: AnyScheme, method: Method, seen: InputStatistics | None) -> tuple[AnyWeight, Costs]:
    """Round one matrix, and leave in `parameter` what the whole numbers stand for, so that later inputs carry the error."""
    if isinstance(scheme, Fp8Scheme):
        return _round_matrix_to_fp8(parameter_OI, scheme, seen)
    weight_OI = turned(parameter_OI.detach().float(), scheme)
    usable = seen is not None and seen.tokens > 0
    gram_II = turned_gram(seen.gram_II, scheme) if usable else torch.eye(weight_OI.shape[1])
    if scheme.code:
        spread = feedback(gram_II, method.gptq.damping) if method.spread and usable else None
        wanted_OI = corrected(weight_OI, gram_II, turned_gram(seen.cross_II, scheme), method.gptq) if spread and seen else weight_OI
        encoded = encode(wanted_OI, scheme.code, spread)
        lost = float(output_errors(wanted_OI - encoded.restored_OI, gram_II).sum())
        parameter_OI.copy_(turned_back(encoded.restored_OI, scheme, parameter_OI.shape[1]))
        return encoded.weight, Costs(lost, None, float(output_errors(wanted_OI, gram_II).sum()))
    bits, group = scheme.weight_bits, scheme.group
    nearest = round_to_nearest(weight_OI, gram_II, bits, group)
    rounded = nearest
    if method.spread:
        if usable:
            weight_OI = corrected(weight_OI, gram_II, turned_gram(seen.cross_II, scheme), method.gptq)
        rounded = gptq(weight_OI, gram_II, bits, group, method.gptq)
    costs = Costs(rounded.error, nearest.error, float(output_errors(weight_OI, gram_II).sum()))
    parameter_OI.copy_(turned_back(restored(rounded, group), scheme, parameter_OI.shape[1]))
    return pack_as(scheme, rounded.whole_OI, rounded.scales_OG), costs


def _round_matrix_to_fp8(parameter_OI: Tensor, scheme: Fp8Scheme, seen: InputStatistics | None) -> tuple[AnyWeight, Costs]:
    """FP8 numbers are rounded to nearest, whatever the method: what was seen gives the scale of static activations."""
    usable = seen is not None and seen.tokens > 0
    gram_II = seen.gram_II if usable else torch.eye(parameter_OI.shape[1])
    made = round_to_fp8(parameter_OI.float(), scheme, float(seen.largest_I.max()) if usable else None)
    restored_OI = restored_from_fp8(made.matrix, scheme)
    lost = float(output_errors(parameter_OI.float() - restored_OI, gram_II).sum())
    costs = Costs(lost, lost, float(output_errors(parameter_OI.float(), gram_II).sum()))
    parameter_OI.copy_(restored_OI)
    return made, costs


def _round_experts(
    experts: Experts, scheme: AnyScheme, method: Method, seen: ExpertStatistics | None
) -> tuple[list[tuple[AnyWeight, AnyWeight]], Costs]:
    result, total = [], Costs(0.0, 0.0, 0.0)
    for e in range(len(experts.down)):
        gate_up, first = round_matrix(experts.gate_up[e], scheme, method, seen.gate_up[e] if seen else None)
        down, second = round_matrix(experts.down[e], scheme, method, seen.down[e] if seen else None)
        result.append((gate_up, down))
        total = total + first + second
    return result, total


def _filled(block: Block, schemes: Mapping[str, AnyScheme | None], packed: Mapping[str, object]) -> nn.Module:
    """The block with packed modules where `schemes` has one."""
    if not packed:
        return block
    rules = tuple(Rule(pattern=f"0.{name}", scheme=None if scheme is None else str(scheme)) for name, scheme in schemes.items())
    holder = nn.ModuleList([block])  # a block that is packed throughout is replaced as a whole
    prepare_model(holder, QuantSpec(rules=rules))
    for name, weights in packed.items():
        module = holder[0].get_submodule(name)
        if isinstance(module, QuantExperts | Fp8Experts):
            assert isinstance(weights, list)
            for e, pair in enumerate(weights):
                module.fill(e, *pair)
        else:
            assert isinstance(weights, AnyWeight)
            fill_linear(module, weights)
    return holder[0]


def fill_linear(module: nn.Module, weight: AnyWeight) -> None:
    """Give an empty `QuantLinear` or `Fp8Linear` its matrix."""
    if isinstance(module, Fp8Linear):
        assert isinstance(weight, Fp8Weight)
        module.fill(weight)
    else:
        assert isinstance(module, QuantLinear)
        assert isinstance(weight, PackedWeight | CodedWeight)
        module.fill(weight)


def _widen(block: Block, schemes: Mapping[str, AnyScheme | None], statistics: Statistics, *, smooth: bool = False) -> dict[str, float]:
    """Widen all inputs of the block whose source allows it, in place, statistics with them; returns the exponent by module."""
    exponents: dict[str, float] = {}
    attn, ffn = block.attn, block.ffn
    assert isinstance(attn, Attention)
    for source, names in (("attn_norm", ["attn.qkv"]), ("ffn_norm", _readers_of_ffn_norm(ffn, statistics))):
        found = _search(block, names, schemes, statistics, smooth=smooth)
        if found is not None:
            norm = block.get_submodule(source)
            assert isinstance(norm, RMSNorm)
            norm.weight.div_(found.factors_I)
            if isinstance(ffn, MixtureOfExperts) and source == "ffn_norm":
                ffn.router.weight.mul_(found.factors_I)
                if ffn.vision is not None:  # what reads the same norm takes its share, seen or not
                    ffn.vision.router.weight.mul_(found.factors_I)
                    if "ffn.vision.experts" not in names:
                        ffn.vision.experts.gate_up.mul_(found.factors_I)
            exponents |= dict.fromkeys(names, found.exponent)
    found = _search(block, ["attn.out"], schemes, statistics, attn, smooth=smooth)
    if found is not None:
        awq.fold_into_values(attn.qkv.weight, attn.qkv.bias, found.factors_I, attn.num_heads, attn.num_kv_heads)
        exponents["attn.out"] = found.exponent
    for name in ("ffn", "ffn.shared"):
        inner = block.get_submodule(name) if name == "ffn" or getattr(ffn, "shared", None) is not None else None
        if isinstance(inner, SwiGLU) and (found := _search(block, [f"{name}.down"], schemes, statistics, smooth=smooth)) is not None:
            awq.fold_into_up(inner.gate_up.weight, inner.gate_up.bias, found.factors_I)
            exponents[f"{name}.down"] = found.exponent
    for name in ("ffn.experts", "ffn.vision.experts"):
        if name in statistics and (scheme := schemes[name]) is not None:
            experts = block.get_submodule(name)
            assert isinstance(experts, Experts)
            _widen_inside_experts(experts, scheme, statistics[name], smooth=smooth)
    return exponents


def _readers_of_ffn_norm(ffn: nn.Module, seen: Collection[str]) -> list[str]:
    if isinstance(ffn, MixtureOfExperts):
        return [name for name in ("ffn.experts", "ffn.shared.gate_up", "ffn.vision.experts") if name in seen]
    return ["ffn.gate_up"]


def _search(
    block: Block, names: Sequence[str], schemes: Mapping[str, AnyScheme | None], statistics: Statistics, heads: Attention | None = None,
    *, smooth: bool = False,
) -> awq.Widening | None:  # fmt: skip
    """AWQ's or SmoothQuant's factors for the modules that share an input, applied to weights and statistics; None when no factors help.

    A module that stays whole has no say, but takes its share of the factors. `heads`: the input is this attention's output.
    """
    readers: list[awq.Reader] = []
    for name in names:
        scheme, seen, module = schemes[name], statistics[name], block.get_submodule(name)
        if scheme is None or isinstance(scheme, Fp8Scheme) or (smooth and scheme.code):
            continue  # of floats with a scale of their own widening moves the exponents only, and codes are not rounded number by number
        if isinstance(seen, ExpertStatistics):
            assert isinstance(module, Experts)
            step = max(1, len(module.gate_up) // _EXPERTS_SEARCHED)
            shared = seen.everything.gram_II
            readers += [awq.Reader(module.gate_up[e], shared, scheme) for e in range(0, len(module.gate_up), step)]
        else:
            assert isinstance(module, Linear)
            readers.append(awq.Reader(module.weight, seen.gram_II, scheme))
    if not readers or (not smooth and all(reader.scheme.weight_bits == 8 for reader in readers)):
        return None  # at 8 bits the weights alone have nothing to win
    first = statistics[names[0]]
    entered = first.everything if isinstance(first, ExpertStatistics) else first

    def shared(x_I: Tensor) -> Tensor:
        return x_I if heads is None else awq.shared_by_head(x_I, heads.num_heads, heads.num_kv_heads)

    if smooth:
        found = smooth_search(entered.largest_I, entered.kept_SI, readers, shared)
    else:
        found = awq.search(shared(entered.mean_magnitude()), readers)
    if not found.exponent:
        return None
    for name in names:
        module, seen = block.get_submodule(name), statistics[name]
        if isinstance(seen, ExpertStatistics):
            assert isinstance(module, Experts)
            module.gate_up.mul_(found.factors_I)
            narrowed = seen.everything.narrowed(found.factors_I)
            seen.gate_up = [narrowed if s is seen.everything else s.narrowed(found.factors_I) for s in seen.gate_up]
            seen.everything = narrowed
        else:
            assert isinstance(module, Linear)
            module.weight.mul_(found.factors_I)
            statistics[name] = seen.narrowed(found.factors_I)
    return found


def _widen_inside_experts(experts: Experts, scheme: AnyScheme, seen: object, *, smooth: bool) -> None:
    """Each expert's inner values have factors of their own, folded into its up rows."""
    assert isinstance(seen, ExpertStatistics)
    if isinstance(scheme, Fp8Scheme) or (scheme.weight_bits == 8 and not smooth):
        return
    for e in range(len(experts.down)):
        down = seen.down[e]
        readers = [awq.Reader(experts.down[e], down.gram_II, scheme)]
        if smooth:
            found = smooth_search(down.largest_I, down.kept_SI, readers)
        else:
            found = awq.search(down.mean_magnitude(), readers, steps=10)
        if found.exponent:
            experts.down[e].mul_(found.factors_I)
            awq.fold_into_up(experts.gate_up[e], None, found.factors_I)
            seen.down[e] = down.narrowed(found.factors_I)
