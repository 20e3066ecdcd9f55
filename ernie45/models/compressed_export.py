"""A model as a folder in the format of compressed-tensors, for vLLM and transformers, written one layer at a time.

Matrices of a packed folder keep their whole numbers and scales; those of a float model are rounded here, to nearest. Embedding, head,
norms, routers and the multi-token predictor stay floats. Names and layout are those of published `-PT` folders, so a joined matrix
(q|k|v, gate|up, stacked experts) is cut into its parts first, and blocks of FP8 numbers begin anew in each.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.load import OpenModel
from ernie45.models.names import FLOAT32_ENDINGS, name_table
from ernie45.models.save import copy_companions, new_folder
from ernie45.models.text import Decoder
from ernie45.nn.layers import Linear
from ernie45.nn.moe import Router
from ernie45.ops.fp8 import Fp8Matrix, from_fp8, to_fp8
from ernie45.ops.quantised import PackedWeight, dequantise
from ernie45.quant.fp8 import Fp8Weight, weight_block
from ernie45.quant.model import quantisable
from ernie45.quant.pack import unpacked
from ernie45.quant.rtn import round_to_nearest
from ernie45.quant.spec import AnyScheme, Fp8Scheme, Scheme, parse_scheme
from ernie45.weights.compressed import FLOAT, INTEGER, PACKED, Form, integer_parts, quantization_config
from ernie45.weights.rename import LoadPlan, Piece
from ernie45.weights.safetensors_write import write_in_parts
from ernie45.weights.stream import check_finite, load_pieces, save_piece

Told = Callable[[str, int, int], None]
"""Hears what is written, and how many parts are done of how many."""


@dataclass(frozen=True)
class CompressedExport:
    """What was written: bytes of all tensors, how many matrices have each form, and what a reader should know."""

    size: int
    formats: dict[str, int]
    notes: tuple[str, ...]


def export_compressed(opened: OpenModel, word: str | None, out: Path, *, told: Told | None = None) -> CompressedExport:
    """Write the model `opened` as the folder `out`; `word` is the scheme for a float model, None for a packed one.

    Raises `ConfigError` for a scheme that compressed-tensors cannot express or that a packed model has not, `CheckpointError` when the
    model is not whole, its widths do not divide into groups, a weight is no number, or the disk is full. Nothing is left behind then.
    """
    if not opened.plan.complete:
        raise CheckpointError(opened.complaint())
    if opened.vision is not None:
        raise CheckpointError(f"{opened.path}: a model that sees is not written in this format yet; load it with text only")
    source = _Source(opened, word)
    pieces = _pieces(source)
    forms, notes = _forms(source, pieces)
    groups = list(forms.items()) if len(forms) > 1 else [(form, ["Linear"]) for form in forms]
    with new_folder(out) as partial:
        size = write_in_parts(partial, _parts(source, pieces, told), len(pieces))
        body = opened.config.to_hf() | {
            "torch_dtype": "bfloat16",
            "quantization_config": quantization_config(groups, _left_whole(source, pieces)),
        }
        (partial / "config.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        copy_companions(opened.path, partial)
    counts = Counter(form.kind for form, modules in forms.items() for _ in modules)
    return CompressedExport(size, dict(counts), notes)


class _Source:
    """The parameters of an opened model, float or packed, and the scheme of each matrix."""

    def __init__(self, opened: OpenModel, word: str | None) -> None:
        if (word is None) == (opened.spec is None):
            raise ConfigError(
                f"{opened.path} is packed and keeps its own schemes; leave --scheme out"
                if word is not None
                else f"{opened.path} is a float model; say how its matrices are to be stored, such as --scheme w4a16-g128"
            )
        self.opened = opened
        with torch.device("meta"):
            self.skeleton = Decoder(opened.config)
        self.shapes = {name: tuple(value.shape) for name, value in self.skeleton.state_dict().items()}
        self._chosen = None if word is None else parse_scheme(word)
        self._matrices = {name for name, _ in quantisable(self.skeleton)}
        for name in self._matrices:
            if (scheme := self.scheme_of(name)) is not None:
                _refuse_inexpressible(name, scheme)
                if isinstance(scheme, Fp8Scheme) and scheme.static and opened.spec is None:
                    raise ConfigError(
                        f"{scheme} needs text to be measured on; take fp8-{scheme.weights}, or export what `ernie quantize` made"
                    )

    def scheme_of(self, module: str) -> AnyScheme | None:
        """What the matrix `module` is written as; None: floats."""
        if module not in self._matrices or not module.startswith("layers."):
            return None
        return self.opened.spec.scheme_for(module) if self.opened.spec is not None else self._chosen

    def _stored_as(self, ours: str) -> AnyScheme | None:
        """How the files hold a parameter; None: as floats."""
        module, spec = _module_of(ours), self.opened.spec
        return spec.scheme_for(module) if spec is not None and module in self._matrices and not ours.endswith(".bias") else None

    def _read(self, name: str) -> Tensor:
        """A tensor of a packed folder. Raises `CheckpointError` for a scale that is no number."""
        tensor = self.opened.files.read(name)
        if name.endswith("_scale"):
            check_finite(name, tensor.float())
        return tensor

    def fp8(self, ours: str) -> list[Fp8Weight] | None:
        """As `packed`, for FP8 numbers."""
        scheme = self._stored_as(ours)
        if not isinstance(scheme, Fp8Scheme):
            return None
        stem = ours.removesuffix("weight")  # of a stack of experts the whole name
        values, scales = self._read(f"{ours}_fp8"), self._read(f"{ours}_fp8_scale")
        inputs = self._read(f"{stem}{'' if stem != ours else '_'}input_fp8_scale") if scheme.static else None
        if values.dim() == 2:
            return [Fp8Weight(Fp8Matrix(values, scales, weight_block(scheme)), inputs)]
        matrices = [Fp8Matrix(v, s, weight_block(scheme)) for v, s in zip(values, scales, strict=True)]
        return [Fp8Weight(matrix, None if inputs is None else inputs[e].view(1)) for e, matrix in enumerate(matrices)]

    def packed(self, ours: str) -> list[PackedWeight] | None:
        """The packed matrix behind a parameter, or those of all experts; None where it is not stored as whole numbers."""
        scheme = self._stored_as(ours)
        if not isinstance(scheme, Scheme):
            return None
        values, scales = (self._read(f"{ours}{ending}") for ending in ("_packed", "_scale"))
        out_size = self.shapes[ours][-2]
        stacks = zip(values, scales, strict=True) if values.dim() == 4 else [(values, scales)]
        return [PackedWeight(v, s, scheme.weight_bits, out_size, scheme.hadamard, scheme.float_inputs) for v, s in stacks]

    def floats(self, ours: str) -> Tensor:
        """A parameter as float32. Raises `CheckpointError` when it holds what is no number."""
        packed = self.packed(ours)
        if packed is not None:
            width = self.shapes[ours][-1]
            return torch.stack([dequantise(one)[:, :width] for one in packed]).view(self.shapes[ours])
        fp8 = self.fp8(ours)
        if fp8 is not None:
            return torch.stack([from_fp8(one.matrix) for one in fp8]).view(self.shapes[ours])
        plan = LoadPlan(tuple(piece for piece in self.opened.plan.pieces if piece.ours == ours))
        return load_pieces(plan, self.opened.files, {ours: self.shapes[ours]}, lambda _: torch.float32)[ours]


def _module_of(ours: str) -> str:
    return ours.rpartition(".")[0]


def _refuse_inexpressible(name: str, scheme: AnyScheme) -> None:
    if isinstance(scheme, Scheme) and scheme.code:
        raise ConfigError(f"'{name}' is {scheme}: codes of two bits have no word in compressed-tensors; export the model it was made from")
    if scheme.hadamard:
        raise ConfigError(
            f"'{name}' is {scheme}: turned inputs have no word in compressed-tensors; quantise with --no-hadamard, or leave -h out"
        )


def _pieces(source: _Source) -> dict[str, list[Piece]]:
    """File tensors by the shard they go to: "" for the ends, else the layer's number. Raises where a width does not divide into groups."""
    result: dict[str, list[Piece]] = {}
    for piece in name_table(source.opened.config, "pt").save_plan(source.shapes):
        scheme = source.scheme_of(_module_of(piece.ours))
        group = scheme.group if isinstance(scheme, Scheme) else 0
        if group and len(piece.shape) == 2 and piece.shape[1] % group:
            raise CheckpointError(f"{piece.file} is {piece.shape[1]} wide, not a multiple of the group {group}; take a smaller group")
        if scheme == Fp8Scheme("block") and any(extent % 128 for extent in piece.shape[-2:]):
            raise CheckpointError(f"{piece.file} is {piece.shape[-2]} x {piece.shape[-1]}, not whole blocks of 128 x 128; take fp8-channel")
        shard = piece.ours.split(".")[1] if piece.ours.startswith("layers.") else ""
        result.setdefault(shard, []).append(piece)
    return result


def _quantised(source: _Source, piece: Piece) -> AnyScheme | None:
    """The scheme of a file tensor; None for one that is no matrix or stays whole."""
    return source.scheme_of(_module_of(piece.ours)) if len(piece.shape) == 2 else None


def _form(scheme: AnyScheme) -> Form:
    """How a matrix of `scheme` is stored."""
    if isinstance(scheme, Fp8Scheme):
        block = {"block": (128, 128), "channel": None, "tensor": (0, 0)}[scheme.weights]
        return Form(FLOAT, block=block, inputs="static" if scheme.static else "group" if scheme.weights == "block" else "token")
    if scheme == Scheme(8, 0):
        return Form(INTEGER, inputs="token")
    return Form(PACKED, scheme.weight_bits, scheme.group)


def _forms(source: _Source, pieces: dict[str, list[Piece]]) -> tuple[dict[Form, list[str]], tuple[str, ...]]:
    """Forms with the modules that have them, and notes for the reader."""
    found: dict[Form, list[str]] = {}
    notes = {}
    for piece in (one for shard in pieces.values() for one in shard):
        scheme = _quantised(source, piece)
        if scheme is None:
            continue
        form = _form(scheme)
        found.setdefault(form, []).append(piece.file.removesuffix(".weight"))
        if isinstance(scheme, Scheme) and not scheme.float_inputs and form.kind == PACKED:
            notes[f"{scheme}: written with float activations, since this format has no 8-bit ones beside such weights"] = None
    if not found:
        raise ConfigError(f"{source.opened.path}: none of its layers has a quantised matrix")
    return found, tuple(notes)


def _left_whole(source: _Source, pieces: dict[str, list[Piece]]) -> list[str]:
    """Linear modules that are floats: programs that take every Linear as quantised must hear of them, of a tied head as well."""
    linear = {f"{name}.weight" for name, module in source.skeleton.named_modules() if isinstance(module, Linear | Router)}
    every = [piece for shard in pieces.values() for piece in shard]
    left = [piece.file.removesuffix(".weight") for piece in every if piece.ours in linear and _quantised(source, piece) is None]
    return left if "lm_head" in left else ["lm_head", *left]


def _parts(source: _Source, pieces: dict[str, list[Piece]], told: Told | None) -> Iterator[dict[str, Tensor]]:
    """The tensors of each shard, one shard in memory at a time."""
    for done, (shard, here) in enumerate(pieces.items()):
        if told:
            told(f"layer {shard}" if shard else "embedding and head", done + 1, len(pieces))
        tensors: dict[str, Tensor] = {}
        for ours in dict.fromkeys(piece.ours for piece in here):
            of_one = [piece for piece in here if piece.ours == ours]
            tensors |= _tensors(source, ours, of_one)
        yield tensors


def _tensors(source: _Source, ours: str, pieces: list[Piece]) -> dict[str, Tensor]:
    """The file tensors of one parameter."""
    scheme = _quantised(source, pieces[0])
    if scheme is None:
        floats = source.floats(ours)
        kind = torch.float32 if ours.endswith(FLOAT32_ENDINGS) or floats.dim() == 1 else torch.bfloat16
        return {piece.file: save_piece(piece, floats, kind) for piece in pieces}
    packed, fp8 = source.packed(ours), source.fp8(ours)
    floats = source.floats(ours) if packed is None and fp8 is None else None
    result: dict[str, Tensor] = {}
    for piece in pieces:
        expert, rows = (piece.box[0][0] if len(piece.box) == 3 else 0), slice(*piece.box[-2])
        if packed is not None:
            whole_OI, scales_OG = unpacked(packed[expert], piece.shape[1])
            parts = integer_parts(_form(scheme), whole_OI[rows].contiguous(), scales_OG[rows].contiguous())
        elif fp8 is not None:
            parts = _cut(fp8[expert], rows, piece.file)
        else:
            assert floats is not None
            parts = _rounded(save_piece(piece, floats, torch.float32), scheme, piece.file)
        stem = piece.file.removesuffix("weight")
        result |= {f"{stem}{ending}": tensor for ending, tensor in parts.items()}
    return result


def _cut(weight: Fp8Weight, rows: slice, name: str) -> dict[str, Tensor]:
    """Rows of an FP8 matrix as file tensors. Raises `CheckpointError` where they do not begin and end with blocks."""
    matrix, first, end = weight.matrix, rows.start, rows.stop
    step = matrix.block.rows
    if step and (first % step or (end % step and end != len(matrix.values))):
        raise CheckpointError(f"{name} is rows {first} to {end} of a joined matrix, whose blocks have {step}; quantise with fp8-channel")
    scales = matrix.scales[first // step : -(-end // step)] if step else matrix.scales.view(1)
    parts = {"weight": matrix.values[rows].contiguous(), "weight_scale": scales.contiguous()}
    return parts if weight.input_scale is None else {**parts, "input_scale": weight.input_scale.clone()}


def _rounded(matrix_OI: Tensor, scheme: AnyScheme, name: str) -> dict[str, Tensor]:
    """A float matrix rounded to nearest, as file tensors."""
    check_finite(name, matrix_OI)
    if isinstance(scheme, Fp8Scheme):
        made = to_fp8(matrix_OI, weight_block(scheme))
        return {"weight": made.values, "weight_scale": made.scales.view(1) if scheme.weights == "tensor" else made.scales}
    packed = round_to_nearest(matrix_OI, scheme)
    assert isinstance(packed, PackedWeight), "codes are refused before"
    whole_OI, scales_OG = unpacked(packed, matrix_OI.shape[1])
    return integer_parts(_form(scheme), whole_OI, scales_OG)
