"""Quantised checkpoints of other programs, read as floats: GPTQ, AWQ, compressed-tensors (packed, integer, FP8) and block FP8.

Every quantised matrix appears as one float tensor `NAME.weight`, decoded when it is read, so that name tables and loading know nothing of
it. Formats, [O, I] being the matrix and G the groups along I:

    gptq     qweight int32 [I * bits / 32, O], low bits first; qzeros int32 [G, O * bits / 32], one less than meant (as meant in "gptq_v2");
             scales [G, O]; g_idx int32 [I], the group of each input: w = (q - z) * s
    awq      qweight int32 [I, O / 8], eight outputs a word in the order 0 2 4 6 1 3 5 7; qzeros likewise [G, O / 8]; scales [G, O]
    compressed-tensors  weight_packed int32 [O, I * bits / 32], each number + 2^(bits-1), low bits first; weight_shape; weight_scale [O, G];
             or weight int8 / float8 with weight_scale [O, 1], [O, G], [1], [] or one per block. Asymmetric: weight_zero_point, packed along
             O, or int8 [O, G] as it stands: w = (q - z) * s. weight_g_idx int32 [I]: the group of each input. The input_scale of static
             activations is left aside: what reads floats computes in floats
    fp8      weight float8 with weight_scale_inv, one number per block of the matrix

Sources: the formats as the packages gptqmodel, autoawq and compressed-tensors write them.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.weights.safetensors import TensorFiles, TensorInfo

METHODS = ("gptq", "awq", "compressed-tensors", "fp8")
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where output j of a word lies
_PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale"),
    "fp8": ("weight", "weight_scale_inv"),
}
_INTEGER_PARTS = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx", "input_scale")


class DecodedFiles:
    """`TensorFiles` whose quantised matrices read as floats; the same methods."""

    owned = False

    def __init__(self, files: TensorFiles, settings: Mapping[str, Any], where: str) -> None:
        """`settings`: the checkpoint's quantization_config. Raises CheckpointError for a method, width or zero point that is not read."""
        self._files, self._where = files, where
        self._method = str(settings.get("quant_method"))
        if self._method not in METHODS:
            raise CheckpointError(f"{where}: quantised by '{self._method}', which is not read; {', '.join(METHODS)} and ernie45's own are")
        self._bits = settings.get("bits", 4)
        if self._method == "gptq" and self._bits not in (2, 4, 8):
            raise CheckpointError(f"{where}: GPTQ with {self._bits!r} bits is not read; 2, 4 and 8 are")
        if self._method == "awq" and self._bits != 4:
            raise CheckpointError(f"{where}: AWQ with {self._bits!r} bits is not read; 4 are")
        # the first format stores zero points less one
        self._zero_shift = 0 if self._method == "awq" or settings.get("checkpoint_format") == "gptq_v2" else 1
        self._block = _block_of(settings, where)
        self._infos: dict[str, TensorInfo] = {}
        self._parts: dict[str, tuple[str, ...]] = {}
        self._find()

    def _find(self) -> None:
        left = dict.fromkeys(self._files.names())
        for parts in (_PARTS[self._method], _INTEGER_PARTS) if self._method == "compressed-tensors" else (_PARTS[self._method],):
            for name in [name for name in left if name.rpartition(".")[2] == parts[0]]:
                module = name.rpartition(".")[0]
                if f"{module}.{parts[1]}" not in left:
                    continue  # a float matrix beside quantised ones
                names = tuple(f"{module}.{part}" for part in parts if f"{module}.{part}" in left)
                self._parts[f"{module}.weight"] = names
                for one in names:
                    left.pop(one)
        for name in left:
            if name.endswith((".weight_zero_point", ".qzeros", ".input_scale", ".weight_g_idx")):
                raise CheckpointError(f"{self._where}: tensor {name!r} belongs to a form of {self._method} that is not read")
            self._infos[name] = self._files.info(name)
        for name, parts in self._parts.items():
            scale = self._files.info(parts[1 if self._method in ("compressed-tensors", "fp8") else 2])
            kind = torch.bfloat16 if scale.dtype == torch.bfloat16 else torch.float32
            self._infos[name] = TensorInfo(name, kind, self._shape(name, parts), scale.file)

    def _shape(self, name: str, parts: tuple[str, ...]) -> tuple[int, ...]:
        first = self._files.info(parts[0]).shape
        if len(first) != 2:
            raise CheckpointError(f"{self._where}: tensor {parts[0]!r} has shape {list(first)}; a matrix is expected")
        if self._method == "gptq":
            return (first[1], first[0] * 32 // self._bits)
        if self._method == "awq":
            return (first[1] * 8, first[0])
        if parts[0].endswith("_packed"):
            shape = next((part for part in parts if part.endswith(".weight_shape")), None)
            if shape is None or self._files.info(shape).shape != (2,):
                raise CheckpointError(f"{self._where}: {name!r} lacks a weight_shape of two numbers")
            rows, columns = (int(extent) for extent in self._files.read(shape).tolist())
            if rows != first[0] or not 0 < columns <= first[1] * 32:
                raise CheckpointError(f"{self._where}: {name!r} says it is {rows} x {columns}, its packed form is {list(first)}")
            return (rows, columns)
        return first

    def names(self) -> list[str]:
        """All tensor names, quantised matrices as `NAME.weight`."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Type and shape as they are read."""
        return self._infos[name]

    def read(self, name: str) -> Tensor:
        """The tensor, decoded to the type that `info` says if it is quantised. Raises CheckpointError when its parts do not fit."""
        if name not in self._parts:
            return self._files.read(name)
        tensors = {part.rpartition(".")[2]: self._files.read(part) for part in self._parts[name]}
        decode: Callable[[Mapping[str, Tensor], tuple[int, ...]], Tensor] = {
            "gptq": self._gptq,
            "awq": self._awq,
        }.get(self._method, lambda parts, extents: _scaled(parts, extents, self._block))
        try:
            return decode(tensors, self._infos[name].shape).to(self._infos[name].dtype)
        except (RuntimeError, IndexError, ValueError) as error:
            raise CheckpointError(f"{self._where}: the parts of {name!r} do not fit together: {error}") from error

    def _gptq(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        whole_IO = _lanes(tensors["qweight"], self._bits).transpose(1, 2).flatten(0, 1)
        zeros_GO = _lanes(tensors["qzeros"], self._bits).flatten(1) + self._zero_shift
        scales_GO = tensors["scales"].float()
        group_I = _groups_of_inputs(tensors.get("g_idx"), shape[1], len(scales_GO))
        return ((whole_IO - zeros_GO[group_I]) * scales_GO[group_I]).t()

    def _awq(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        whole_IO, zeros_GO = (_lanes(tensors[part], 4)[..., _AWQ_ORDER].flatten(1) for part in ("qweight", "qzeros"))
        size = -(-shape[1] // len(zeros_GO))
        spread = [part.repeat_interleave(size, 0)[: shape[1]] for part in (zeros_GO, tensors["scales"].float())]
        return ((whole_IO - spread[0]) * spread[1]).t()

    def release(self, name: str) -> None:
        """Give back the memory of the file's pages."""
        for part in self._parts.get(name, (name,)):
            self._files.release(part)

    def close(self) -> None:
        """Forget the files."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _lanes(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers in each word, low bits first: [..., W] -> int32 [..., W, 32 / bits]."""
    if words.dtype != torch.int32:
        raise ValueError(f"packed words are {words.dtype}, not int32")
    return (words[..., None] >> torch.arange(0, 32, bits, dtype=torch.int32)) & ((1 << bits) - 1)


def _groups_of_inputs(named_I: Tensor | None, width: int, groups: int) -> Tensor:
    """The group of each input, int64 [I]: as the file says, or equal runs. Raises ValueError for groups that do not exist."""
    if named_I is None or bool((named_I == -1).all()):  # -1 throughout: not set, the groups are equal runs
        return torch.arange(width) // -(-width // groups)
    if len(named_I) != width or int(named_I.min()) < 0 or int(named_I.max()) >= groups:
        raise ValueError(f"g_idx has {len(named_I)} inputs of {width} and names group {int(named_I.max())} of {groups}")
    return named_I.long()


def _block_of(settings: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns of the blocks that share a scale, where the settings name some. Raises CheckpointError for what is no such pair."""
    groups = settings.get("config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    named = [settings.get("weight_block_size"), *(one.get("block_structure") for one in weights if isinstance(one, Mapping))]
    found = [block for block in named if block is not None]
    if not found:
        return None
    block = found[0]
    if any(other != block for other in found) or not isinstance(block, list) or len(block) != 2:
        raise CheckpointError(f"{where}: blocks of {found!r} share a scale; one pair of rows and columns is read")
    if not all(type(extent) is int and extent > 0 for extent in block):
        raise CheckpointError(f"{where}: blocks of {block!r} share a scale; two whole numbers above 0 are read")
    return block[0], block[1]


def _scaled(tensors: Mapping[str, Tensor], shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    """Packed, integer or FP8 numbers less their zero points times their scales: one, or one per row, per group of inputs or per block."""
    whole = tensors["weight_packed"] if "weight_packed" in tensors else tensors["weight"]
    scale = (tensors["weight_scale"] if "weight_scale" in tensors else tensors["weight_scale_inv"]).float()
    zero = tensors.get("weight_zero_point")
    if scale.dim() == 1:
        scale = scale[:, None] if len(scale) > 1 else scale.view(1, 1)
    if "weight_packed" in tensors:
        bits = whole.shape[1] * 32 // shape[1]
        if bits not in (4, 8):
            raise ValueError(f"{bits} bits a number; 4 and 8 are read")
        offset = 1 << (bits - 1)
        whole = _lanes(whole, bits).flatten(1)[:, : shape[1]] - offset
        if zero is not None:
            zero = _lanes(zero.t(), bits).flatten(1)[:, : shape[0]].t() - offset
    if zero is not None and zero.numel() > 1 and zero.shape != scale.shape:
        raise ValueError(f"zero points {list(zero.shape)} and scales {list(scale.shape)}")
    named_I = tensors.get("weight_g_idx")
    spread = [part if part.numel() <= 1 else _spread(part, shape, block, named_I) for part in (scale, zero) if part is not None]
    return (whole.float() - spread[1].float() if zero is not None else whole.float()) * spread[0]


def _spread(part: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None, named_I: Tensor | None) -> Tensor:
    """A number per row, group or block, at every element it belongs to."""
    if block is not None and tuple(part.shape) == tuple(-(-extent // step) for extent, step in zip(shape, block, strict=True)):
        return part.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
    if part.shape[0] > shape[0] or part.shape[1] > shape[1]:
        raise ValueError(f"scales {list(part.shape)} for a matrix {list(shape)}")
    rows = part.repeat_interleave(-(-shape[0] // part.shape[0]), 0)[: shape[0]]
    return rows[:, _groups_of_inputs(named_I, shape[1], part.shape[1])]
