"""Tensors streamed from files into parameters and back, one at a time, as a plan of `rename` says.

Each parameter is allocated once, filled box by box, and the file's pages are given back after each copy; or, where that is asked for, a
parameter that is one file tensor of the right type stays a view of the mapped file. Either way loading never holds two copies of the
weights. A copy costs a moment and is read faster ever after: the mapping comes in small pages, in which a matrix-vector product was
measured at 12 to 15 GB/s where it reads 19 to 21 from memory of its own (docs/log.md).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ernie45.errors import CheckpointError
from ernie45.weights.rename import LoadPlan, Piece, Shape

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, and the elements done and in all."""


class TensorSource(Protocol):
    """What both safetensors and GGUF files offer."""

    @property
    def owned(self) -> bool:
        """Whether `read` gives memory of its own, and not a view of the mapped file."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor; a view where the file allows it."""
        ...

    def release(self, name: str) -> None:
        """Give back the memory behind a tensor that was copied."""
        ...


def load_pieces(
    plan: LoadPlan,
    source: TensorSource,
    wanted: Mapping[str, Shape],
    dtype_of: Callable[[str], torch.dtype],
    *,
    mapped: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Parameter name -> tensor of the wanted shape and of type `dtype_of(name)`, for a complete plan.

    `mapped` leaves what needs no change in the file's mapping: less to do now, and memory that the system can take back.

    `uint16` file tensors are bfloat16 bits (so numpy writes them). With `check`, a NaN or an infinity raises CheckpointError; that reads
    each tensor once more while it is in the cache: 3 to 4 billion elements a second on one core.
    """
    assert plan.complete, plan.explain()
    result: dict[str, Tensor] = {}
    done, total = 0, sum(_elements(shape) for shape in wanted.values())
    for piece in plan.pieces:
        dtype = dtype_of(piece.ours)
        tensor = source.read(piece.file)
        if piece.row is not None:
            tensor = tensor[piece.row]
        if dtype.is_floating_point and dtype.itemsize > 1:
            tensor = _as_float(piece.file, tensor)
            if check:
                check_finite(piece.file, tensor)
        elif tensor.dtype != dtype:  # packed bytes mean nothing in another type
            raise CheckpointError(f"tensor {piece.file!r} is {_kind(tensor)}; packed weights are {str(dtype).removeprefix('torch.')}")
        elif check and dtype == torch.float8_e4m3fn and bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise CheckpointError(f"tensor {piece.file!r} holds NaN: the file is damaged; download or quantise it again")
        if (mapped or source.owned) and piece.whole and not piece.turned and tensor.dtype == dtype:
            result[piece.ours] = tensor.view(wanted[piece.ours])
        else:
            if piece.ours not in result:
                result[piece.ours] = torch.empty(wanted[piece.ours], dtype=dtype)
            place = result[piece.ours][tuple(slice(begin, end) for begin, end in piece.box)]
            place.copy_((tensor.mT if piece.turned else tensor).view(place.shape))
            del tensor
            source.release(piece.file)
        done += _elements(tuple(end - begin for begin, end in piece.box))
        if progress:
            progress(piece.file, done, total)
    return result


def save_tensor(pieces: Sequence[Piece], ours: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One file tensor out of its pieces: one, or one per row of the file tensor."""
    parts = [save_piece(piece, ours[piece.ours], dtype) for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    assert [piece.row for piece in pieces] == list(range(pieces[0].shape[0])), "rows of one file tensor, all of them in order"
    return torch.stack(parts)


def save_piece(piece: Piece, ours: Tensor, dtype: torch.dtype) -> Tensor:
    """What `piece` holds of its parameter: the box, transposed if the layout wants it, in type `dtype`, contiguous.

    Of several rows in one file tensor only the piece's own, without the leading axis.
    """
    shape = piece.shape if piece.row is None or piece.shape[0] == 1 else piece.shape[1:]
    box = ours.detach()[tuple(slice(begin, end) for begin, end in piece.box)]
    if piece.turned:
        box = box.reshape(*shape[:-2], *shape[:-3:-1]).mT
    return box.to(dtype).reshape(shape).contiguous()


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError, naming the tensor, if any element is NaN or infinite.

    Smallest and largest element say it without a temporary: a NaN wins both.
    """
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.reshape(-1).split(1 << 20))
    raise CheckpointError(
        f"tensor {name!r} has {bad:,} of {tensor.numel():,} elements that are NaN or infinite: the file is damaged or training diverged; "
        "download it again, or load with check=False to look at it"
    )


def _as_float(name: str, tensor: Tensor) -> Tensor:
    """A weight as floating point, or a refusal: float8 and integers mean nothing without scales."""
    if tensor.dtype == torch.uint16:
        return tensor.view(torch.bfloat16)
    if tensor.dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        return tensor
    raise CheckpointError(
        f"tensor {name!r} is {_kind(tensor)}; weights are read from bfloat16, float32, float16 or float64; take the float original"
    )


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _elements(shape: Shape) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
