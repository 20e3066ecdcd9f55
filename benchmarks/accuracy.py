"""What fewer bits cost: several forms of one model on the same held-out tokens, beside the original; prints a Markdown table.

python benchmarks/accuracy.py ORIGINAL NAME=MODEL ... [--tokens 8192] [--window 512] [--text FILE] [--json FILE]

MODEL is a folder or GGUF file, `original` for the original itself, or `on-the-fly:SCHEME`. After it may stand

    :weights   matrices are unpacked to floats first, so that the weights alone differ and activations stay whole
    :kv=int8   keys and values are kept as `--kv int8` (or int4) keeps them
    :round=2   matrices of the layers of a model in floats are turned and rounded to nearest of 2**2 levels, one scale of 16 bits for
               each 256 inputs, the best of 32: what the codes of two bits are to be held against, at 2.06 bits a weight

A GGUF file of llama.cpp's making (`llama-quantize MODEL.gguf OUT.gguf Q4_K_M`) is unpacked to floats anyway: the same arithmetic then
runs on both sides. The bytes are those of the quantised matrices with their scales; norms are left out on both sides. Differences are
paired: `+-` is the standard error of the mean difference of the two losses, token by token, and `by window` the same from the means of
whole windows, which allows for neighbouring tokens being alike.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from ernie45.config import Environment
from ernie45.engine.packed_cache import KV_BITS, restored, rounded
from ernie45.models.load import LoadedModel, find_model, load
from ernie45.models.on_the_fly import load_quantised
from ernie45.models.text import Decoder
from ernie45.nn.attention import Attend, PackedCausal
from ernie45.nn.layers import Embedding, Linear
from ernie45.ops import dequantise
from ernie45.ops.quantised import hadamard
from ernie45.quant.linear import QuantEmbedding, QuantLinear
from ernie45.quant.measure import Quality, QualityCounter
from ernie45.quant.model import unfuse
from ernie45.recipes.texts import built_in_text, read_text, spread_windows
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.weights.gguf import GgufFile


class RoundedCausal:
    """Causal attention over keys and values as a packed cache keeps them: turned, rounded, and here turned back at once."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """[T, N, H] from [T, N, H] and [T, K, H] twice; all tokens are one sequence."""
        return PackedCausal([len(q_TNH)])(layer, q_TNH, self._kept(k_TKH), self._kept(v_TKH))

    def _kept(self, x_TKH: Tensor) -> Tensor:
        size = x_TKH.shape[-1]
        turn_HH = hadamard(size & -size)
        turned = (x_TKH.float().unflatten(-1, (-1, len(turn_HH))) @ turn_HH).flatten(-2)
        kept = restored(*rounded(turned, self._bits), self._bits)
        return (kept.unflatten(-1, (-1, len(turn_HH))) @ turn_HH).flatten(-2).to(x_TKH.dtype)


@dataclass
class Form:
    """One form of the model, and what was counted of it."""

    name: str
    decoder: Decoder
    kv_bits: int | None
    nbytes: int
    counter: QualityCounter = field(default_factory=QualityCounter)
    windows: list[float] = field(default_factory=list)

    def logits(self, tokens_L: Tensor) -> Tensor:
        """[L] -> [L, V], one whole pass."""
        length = len(tokens_L)
        attend: Attend = PackedCausal([length]) if self.kv_bits is None else RoundedCausal(self.kv_bits)
        return self.decoder.logits(self.decoder(self.decoder.embed(tokens_L), torch.arange(length), attend)).float()

    def count(self, reference_LV: Tensor, tokens_L: Tensor) -> None:
        """One window more."""
        before = self.counter.total_difference
        self.counter.add(reference_LV[:-1], self.logits(tokens_L)[:-1], tokens_L[1:])
        self.windows.append((self.counter.total_difference - before) / (len(tokens_L) - 1))


def form_of(text: str, original: LoadedModel, original_name: str, environment: Environment) -> Form:
    """Read `NAME=MODEL[:weights][:kv=int8]`."""
    name, _, rest = text.partition("=")
    model, *options = rest.split(":")
    if model == "on-the-fly":
        loaded = load_quantised(original_name, options.pop(0), dtype="float32", environment=environment)
    else:
        loaded = original if model == "original" else load(model, dtype="float32", environment=environment)
    nbytes = matrix_bytes(loaded)
    bits = next((int(option.removeprefix("round=")) for option in options if option.startswith("round=")), None)
    if bits is not None:
        loaded = load(original_name if model == "original" else model, dtype="float32", environment=environment)
        nbytes = round_layers(loaded.decoder, bits)
    kv = next((KV_BITS[option.removeprefix("kv=")] for option in options if option.startswith("kv=")), None)
    if "weights" in options:
        to_floats(loaded.decoder)
    return Form(name, loaded.decoder, kv, nbytes)


def matrix_bytes(loaded: LoadedModel) -> int:
    """Bytes of the matrices as they are stored, scales included, without norms and biases."""
    files = loaded.opened.files
    if isinstance(files, GgufFile):
        matrices = [tensor for name in files if len((tensor := files.info(name)).shape) > 1]
        return sum(math.prod(tensor.shape[:-1]) * tensor.type.row_bytes(tensor.shape[-1]) for tensor in matrices)
    state = loaded.decoder.state_dict()
    packed = [value.nbytes for name, value in state.items() if name.endswith(("_packed", "_scale"))]
    return sum(packed) or sum(value.nbytes for value in state.values() if value.dim() > 1)


@torch.no_grad()
def round_layers(decoder: Decoder, bits: int, group: int = 256) -> int:
    """Round the matrices of the layers in place. Returns the bytes they would take, with embedding and head in 8 bits."""
    nbytes = 0
    for name, weight in decoder.named_parameters():
        if weight.dim() < 2:
            continue
        if not name.startswith("layers."):
            nbytes += weight.numel()
            continue
        nbytes += weight.numel() * bits // 8 + 2 * math.ceil(weight.numel() / group)
        turn_HH = hadamard(weight.shape[-1] & -weight.shape[-1])
        turned = (weight.float().unflatten(-1, (-1, len(turn_HH))) @ turn_HH).flatten(-2)
        parts = [nearest_levels(part, bits) for part in turned.split(group, -1)]
        weight.copy_((torch.cat(parts, -1).unflatten(-1, (-1, len(turn_HH))) @ turn_HH.t()).flatten(-2))
    return nbytes


def nearest_levels(part_OG: Tensor, bits: int) -> Tensor:
    """[O, G] -> [O, G]: each row in 2**bits levels around nothing, with the scale of 32 that loses least."""
    top = 2**bits / 2 - 0.5
    best, least = part_OG, torch.full_like(part_OG[:, :1], math.inf)
    for share in range(1, 33):
        step = (part_OG.abs().amax(-1, keepdim=True) * share / 32 / top).half().float().clamp(min=1e-12)
        rounded = ((part_OG / step - 0.5).round() + 0.5).clamp(-top, top) * step
        error = (rounded - part_OG).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best


def to_floats(decoder: Decoder) -> None:
    """Put the matrices that packed modules stand for in their places, as floats."""
    unfuse(decoder)
    for path, module in list(decoder.named_modules()):
        if not isinstance(module, QuantLinear | QuantEmbedding):
            continue
        out_size, in_size = module.out_size, module.in_size
        made: nn.Module = Linear(in_size, out_size) if isinstance(module, QuantLinear) else Embedding(out_size, in_size)
        assert isinstance(made, Linear | Embedding)
        made.weight = nn.Parameter(dequantise(module.weight)[:, :in_size].contiguous(), requires_grad=False)
        parent, _, child = path.rpartition(".")
        setattr(decoder.get_submodule(parent), child, made)


@torch.inference_mode()
def measure(original: LoadedModel, forms: Sequence[Form], windows: Sequence[Sequence[int]]) -> None:
    """Run every form over every window, beside the original."""
    reference = Form("original", original.decoder, None, 0)
    for number, window in enumerate(windows):
        tokens_L = torch.tensor(window)
        reference_LV = reference.logits(tokens_L)
        for form in forms:
            form.count(reference_LV, tokens_L)
        print(f"\r{number + 1}/{len(windows)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def row(form: Form, quality: Quality) -> dict[str, Any]:
    """The figures of one form."""
    by_window = float(torch.tensor(form.windows).std() / len(form.windows) ** 0.5) if len(form.windows) > 1 else float("nan")
    return {
        "form": form.name, "matrix_bytes": form.nbytes, "ratio": quality.ratio, "nll_spread": quality.nll_spread, "by_window": by_window,
        "divergence": quality.divergence, "agreement": quality.agreement, "perplexity_before": quality.perplexity_before,
        "tokens": quality.tokens, "differences_by_window": form.windows,
    }  # fmt: skip


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("forms", nargs="+", metavar="NAME=MODEL")
    for name, default in (("tokens", 8192), ("window", 512), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--text", type=Path, help="held-out text (default: every fourth of Python's help topics)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    environment = Environment.read()
    folder = find_model(args.original, environment)
    reading = read_text(args.text) if args.text else built_in_text(held_out=True)
    windows = spread_windows(load_tokenizer(folder), reading, args.tokens, args.window, "held-out")
    original = load(folder, dtype="float32", environment=environment)
    forms = [form_of(text, original, str(folder), environment) for text in args.forms]
    measure(original, forms, windows)
    rows = [row(form, form.counter.quality()) for form in forms]
    print("| form | bytes of matrices | perplexity | by window | KL | same first choice | tokens |\n|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['form']} | {r['matrix_bytes']:,} | x {r['ratio']:.4f} +- {r['nll_spread']:.4f} | +- {r['by_window']:.4f} "
            f"| {r['divergence']:.4f} | {r['agreement']:.1%} | {r['tokens']:,} |"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
