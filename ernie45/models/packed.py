"""Packed checkpoints: model folders of our own whose matrices lie in the order the kernels read.

`config.json` holds the spec (which module has which scheme), tensors are called as our parameters and buffers are, and every one of them is
used where it is mapped: nothing is converted at load. The format of the matrices stands in `ops/quantised.py`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ernie45.errors import CheckpointError
from ernie45.models.names import FLOAT32_ENDINGS
from ernie45.ops.fp8 import E4M3
from ernie45.quant.spec import QuantSpec
from ernie45.quant.spec import Rule as QuantRule
from ernie45.weights.rename import Ignored, NameTable, Rule

KIND = "ernie45"
VERSION = 1
PACKED_ENDING = "_packed"
SCALE_ENDING = "_scale"
FP8_ENDING, FP8_SCALE_ENDING = "_fp8", "_fp8_scale"


def packed_spec(data: Mapping[str, Any], where: str) -> QuantSpec | None:
    """The spec of a packed checkpoint from its `config.json`; None for any other. Raises `ErnieError` subclasses for a damaged one."""
    found = data.get("quantization_config")
    if not isinstance(found, Mapping) or found.get("quant_method") != KIND:
        return None
    if found.get("version") != VERSION:
        raise CheckpointError(
            f"{where}: packed format version {found.get('version')!r}; this version reads {VERSION}; quantise the model anew"
        )
    return QuantSpec.from_dict({"rules": found.get("rules")}, f"{where}: quantization_config")


def packed_entry(spec: QuantSpec, method: str) -> dict[str, Any]:
    """What `packed_spec` reads back; `method` is kept for people."""
    return {"quant_method": KIND, "version": VERSION, "made_by": method, **spec.to_dict()}


def packed_table(names: Iterable[str], *, mtp: bool, text_only: bool = False) -> NameTable:
    """Files and parameters have the same names."""
    left = [] if mtp else [Ignored("mtp.*", "the MTP block was left out as asked (mtp=False)")]
    if text_only:
        left += [
            Ignored(pattern, "it serves pictures, and only text was asked for") for pattern in ("sight.*", "layers.{layer}.ffn.vision.*")
        ]
    return NameTable("packed", [Rule(ours=name, files=(name,)) for name in names], left)


def packed_dtype(name: str, compute: torch.dtype) -> torch.dtype:
    """The type a parameter or buffer is held in."""
    if name.endswith(FP8_SCALE_ENDING):
        return torch.float32
    if name.endswith(FP8_ENDING):
        return E4M3
    if name.endswith(PACKED_ENDING):
        return torch.uint8
    if name.endswith(SCALE_ENDING):
        return torch.float16
    return torch.float32 if name.endswith(FLOAT32_ENDINGS) else compute


def without_rules_for_mtp(spec: QuantSpec) -> QuantSpec:
    """For a model whose predictor is left out: a rule that fits nothing would be refused."""
    return QuantSpec(rules=tuple(rule for rule in spec.rules if not rule.pattern.startswith("mtp")))


def without_rules_for_sight(spec: QuantSpec) -> QuantSpec:
    """For a vision-language model of which only text is loaded: rules that speak of nothing else go."""
    kept = []
    for rule in spec.rules:
        patterns = [pattern for pattern in rule.pattern.split("|") if not pattern.startswith("sight") and ".vision." not in pattern]
        if patterns:
            kept.append(QuantRule(pattern="|".join(patterns), scheme=rule.scheme))
    return QuantSpec(rules=tuple(kept))
