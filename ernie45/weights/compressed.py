"""Writing the format of compressed-tensors, which vLLM and transformers read: the tensors of one matrix, and the entry in `config.json`.

    pack-quantized   weight_packed int32 [O, I * bits / 32], each number + 2^(bits - 1), low bits first; weight_scale [O, G]; weight_shape
    int-quantized    weight int8 [O, I]; weight_scale float32 [O, 1]; activations become 8 bits, a scale per token, while running
    float-quantized  weight E4M3 [O, I]; weight_scale float32 [O, 1], [1] or by blocks; activations become E4M3 while running

Symmetric throughout. Reading them, and those with zero points, is `foreign`'s. Letters: O and I out- and input widths, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"


@dataclass(frozen=True)
class Form:
    """How matrices are stored. `group` inputs share a scale (0: a row does); `block` is the extent of blocks, (0, 0) for one scale in all.

    `inputs` says how programs quantise activations as they run: "none", "token", "group" (1 x 128), or "static".
    """

    kind: str
    bits: int = 8
    group: int = 0
    block: tuple[int, int] | None = None
    inputs: str = "none"

    def entry(self, targets: Sequence[str]) -> dict[str, Any]:
        """The config group for the modules `targets`."""
        number = "float" if self.kind == FLOAT else "int"
        weights: dict[str, Any] = {"num_bits": self.bits, "type": number, "symmetric": True, "dynamic": False}
        if self.group:
            weights |= {"strategy": "group", "group_size": self.group}
        elif self.block is None:
            weights |= {"strategy": "channel"}
        elif self.block == (0, 0):
            weights |= {"strategy": "tensor"}
        else:
            weights |= {"strategy": "block", "block_structure": list(self.block)}
        common = {"num_bits": 8, "type": number, "symmetric": True}
        inputs = {
            "none": None,
            "token": common | {"strategy": "token", "dynamic": True},
            "group": common | {"strategy": "group", "group_size": 128, "dynamic": True},
            "static": common | {"strategy": "tensor", "dynamic": False},
        }[self.inputs]
        return {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None, "format": self.kind}


def quantization_config(groups: Sequence[tuple[Form, Sequence[str]]], ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a folder: forms with the modules that have them, and the Linear modules that stay whole."""
    kinds = {form.kind for form, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {f"group_{number}": form.entry(targets) for number, (form, targets) in enumerate(groups)},
        "ignore": list(ignored),
    }


def integer_parts(form: Form, whole_OI: Tensor, scales_OG: Tensor) -> dict[str, Tensor]:
    """Name endings and tensors of a matrix of whole numbers, int8 [O, I], with float32 scales [O, G]."""
    if form.kind == INTEGER:
        return {"weight": whole_OI, "weight_scale": scales_OG}
    return {
        "weight_packed": words(whole_OI, form.bits),
        "weight_scale": scales_OG.to(torch.float16),
        "weight_shape": torch.tensor(whole_OI.shape, dtype=torch.int64),
    }


def words(whole_OI: Tensor, bits: int) -> Tensor:
    """Whole numbers of 4 or 8 bits side by side in int32 words, rows filled up with zero bits: int32 [O, ceil(I * bits / 32)]."""
    lanes = 32 // bits
    unsigned = torch.nn.functional.pad(whole_OI.to(torch.int64) + (1 << (bits - 1)), (0, -whole_OI.shape[1] % lanes))
    shifted = unsigned.unflatten(1, (-1, lanes)) << torch.arange(0, 32, bits)
    return (shifted.sum(-1) & 0xFFFFFFFF).to(torch.int32)  # the highest bit becomes the sign
