"""What each matrix would lose under each scheme, measured once on the original model: the input of `allocate`.

Damage is made comparable between matrices by where their outputs go: the relative error of a matrix times the energy its branch (attention
or feed-forward) adds to the residual stream, over the energy of that stream. Letters: S sequences, L their length.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ernie45.nn.block import Block
from ernie45.nn.layers import Linear
from ernie45.nn.moe import Experts
from ernie45.nn.rope import turns
from ernie45.quant.allocate import Need
from ernie45.quant.calibrate import ExpertStatistics, InputStatistics, Pair, Statistics, advance_original, reached
from ernie45.quant.convert import Source, Told, embedded
from ernie45.quant.gptq import output_errors, round_to_nearest
from ernie45.quant.hadamard import turned, turned_gram
from ernie45.quant.model import quantisable
from ernie45.quant.spec import Scheme

_LAST_OF_BRANCH = {"attn": ("attn.out",), "ffn": ("ffn.down", "ffn.shared.down", "ffn.experts")}


@torch.inference_mode()
def survey(source: Source, calibration_SL: Tensor, words: Sequence[str], least_tokens: int, told: Told) -> list[Need]:
    """The needs of every matrix in the layers under the schemes `words`; one pass over the model, one layer in memory."""
    x_SLD = embedded(source.ends(sight=False), calibration_SL)
    turns_LP = turns(torch.arange(calibration_SL.shape[1]), source.frequencies)
    needs: list[Need] = []
    for layer in range(source.num_layers):
        told(f"measuring needs, layer {layer}", layer + 1, source.num_layers)
        block = source.block(layer)
        names = [name for name, _ in quantisable(block) if reached(name, None)]
        seen = Pair(block, x_SLD, turns_LP).observe(names, least_tokens)
        advance_original(block, x_SLD, turns_LP, f"layers.{layer}")
        needs += _needs(block, f"layers.{layer}", seen, words, float(x_SLD.square().sum(dtype=torch.float64)))
    return needs


def _needs(block: Block, prefix: str, seen: Statistics, words: Sequence[str], energy: float) -> list[Need]:
    errors = {name: _errors(block.get_submodule(name), found, words) for name, found in seen.items()}
    branches = {branch: sum(errors[name]["energy"] for name in last if name in errors) / energy for branch, last in _LAST_OF_BRANCH.items()}
    result = []
    for name, found in errors.items():
        share = branches[name.partition(".")[0]]
        module = block.get_submodule(name)
        assert isinstance(module, Linear | Experts)
        weights: list[Tensor] = [module.weight] if isinstance(module, Linear) else [module.gate_up, module.down]
        elements, in_size = sum(weight.numel() for weight in weights), weights[0].shape[-1]
        result.append(Need(f"{prefix}.{name}", elements, in_size, {word: found[word] * share for word in words}))
    return result


def _errors(module: nn.Module, found: InputStatistics | ExpertStatistics, words: Sequence[str]) -> Mapping[str, float]:
    """Relative output error by scheme, and under "energy" what the outputs carry (of experts: of their last matrices)."""
    if isinstance(found, InputStatistics):
        assert isinstance(module, Linear)
        return _matrix_errors(module.weight, found, words)
    assert isinstance(module, Experts)
    total = dict.fromkeys((*words, "energy"), 0.0)
    used = [e for e in range(len(module.down)) if found.routed[e]]
    for e in used:
        first = _matrix_errors(module.gate_up[e], found.gate_up[e], words)
        last = _matrix_errors(module.down[e], found.down[e], words)
        for word in words:
            total[word] += (first[word] + last[word]) / len(used)
        total["energy"] += last["energy"]
    return total


def _matrix_errors(weight_OI: Tensor, found: InputStatistics, words: Sequence[str]) -> dict[str, float]:
    energy = float(output_errors(weight_OI, found.gram_II).sum())
    schemes = {word: Scheme.parse(word) for word in words}
    lost = {
        word: round_to_nearest(turned(weight_OI.float(), s), turned_gram(found.gram_II, s), s.weight_bits, s.group).error
        for word, s in schemes.items()
    }
    return {word: value / (energy or 1.0) for word, value in lost.items()} | {"energy": energy}
