"""A float checkpoint that becomes a packed model while it is loaded: one layer of floats is in memory at a time, nothing is written.

Weights are rounded to nearest, so no text is needed; `ernie quantize` loses less (docs/guides/quantize.md) and is done once. Nothing is
kept for the next start: the rounding is done anew each time.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ernie45.config import Environment
from ernie45.errors import CheckpointError
from ernie45.models.by_layer import LayeredModel
from ernie45.models.compute import choose_compute, cpu_has_bfloat16
from ernie45.models.load import Approve, LoadedModel, find_model, open_model
from ernie45.models.memory import Held
from ernie45.models.names import FLOAT32_ENDINGS
from ernie45.models.sizes import weight_bytes
from ernie45.models.text import Decoder
from ernie45.quant.linear import QuantEmbedding
from ernie45.quant.model import quantise_model
from ernie45.quant.rtn import round_quickly
from ernie45.quant.spec import Fp8Scheme, QuantSpec, Rule, parse_scheme


def load_quantised(
    name_or_path: str | Path,
    scheme: str,
    *,
    dtype: str = "auto",
    text_only: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    approve: Approve | None = None,
    environment: Environment | None = None,
) -> LoadedModel:
    """Load a model with its matrices packed as `scheme` says (`completed`); head and embedding get 8 bits, the MTP block is left out.

    `progress` hears of each layer; `approve` as in `models.load.load`. Raises `ConfigError` for a word that is no scheme, and
    `CheckpointError` for a model that is packed already or does not load.
    """
    word = completed(scheme)
    opened = open_model(find_model(name_or_path, environment or Environment.read()), mtp=False, text_only=text_only)
    if opened.spec is not None:
        raise CheckpointError(f"{opened.path} is quantised already; leave --quantize out")
    coarse = QuantSpec(rules=(Rule(pattern="*", scheme=word),)).rounds_activations
    compute = choose_compute(dtype, torch.float32, fast_bfloat16=cpu_has_bfloat16(), coarse=coarse)
    if approve is not None:
        ends = _rules_of_ends(word, tied=opened.config.tie_embeddings, sees=opened.vision is not None)
        spec = QuantSpec(rules=(*ends, Rule(pattern="layers.*", scheme=word)))
        approve(opened, compute, Held(weight_bytes(opened.described, spec, float_bytes=compute.dtype.itemsize)))
    source = LayeredModel(opened)
    try:
        decoder = _packed(source, word, compute.dtype, progress or (lambda stage, done, total: None))
    finally:
        source.close()
    return LoadedModel(decoder.eval(), compute, opened)


def completed(scheme: str) -> str:
    """`w4a8` and its like with groups of 64 and turned inputs where the word names neither: what loses least at that size."""
    parsed = parse_scheme(scheme)
    if isinstance(parsed, Fp8Scheme):
        return scheme
    return scheme if parsed.group or parsed.hadamard else f"{scheme}-g64-h"


def _rules_of_ends(scheme: str, *, tied: bool, sees: bool) -> tuple[Rule, ...]:
    """What is not in the layers: embedding or head and, of a model that sees, tower and resampler.

    8 bits, activations as in `scheme`; floats beside FP8.
    """
    parsed = parse_scheme(scheme)
    eight = None if isinstance(parsed, Fp8Scheme) else completed(f"w8a{parsed.act_bits}")
    rules = [Rule(pattern="embed" if tied else "head", scheme=eight)]
    if sees:  # the patch embedding stays whole, as `ernie quantize` leaves it
        rules += [Rule(pattern="sight.tower.patches", scheme=None), Rule(pattern="sight.*", scheme=eight)]
    return tuple(rules)


def _packed(source: LayeredModel, word: str, dtype: torch.dtype, progress: Callable[[str, int, int], None]) -> Decoder:
    progress("quantising embedding and head", 0, source.num_layers)
    decoder = source.ends()
    rules = _rules_of_ends(word, tied=decoder.head is None, sees=decoder.sight is not None)
    quantise_model(decoder, QuantSpec(rules=rules), algorithm=round_quickly)
    if isinstance(decoder.embed, QuantEmbedding):
        decoder.embed.dtype = dtype
    _cast(decoder, dtype)
    for layer in range(source.num_layers):
        progress(f"quantising layer {layer}", layer, source.num_layers)
        holder = nn.ModuleList([source.block(layer)])  # a block that is packed throughout is replaced as a whole
        quantise_model(holder, QuantSpec(rules=(Rule(pattern="*", scheme=word),)), algorithm=round_quickly)
        _cast(holder, dtype)
        decoder.layers.append(holder[0])
    progress("quantising", source.num_layers, source.num_layers)
    return decoder


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """What stays in floats, in the compute type; routers keep float32, and packed scales their own."""
    for name, parameter in network.named_parameters():
        if not name.endswith(FLOAT32_ENDINGS):
            parameter.data = parameter.data.to(dtype)
