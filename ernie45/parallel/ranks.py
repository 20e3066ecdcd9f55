"""The processes of one run: who takes which batch, and how they add up what each of them has.

`torchrun --nproc-per-node 4 -m ernie45 sft ...` starts four ranks that run the same text. `Ranks` is all that this text knows of it: with
one process every method hands back what it was given. Ranks meet in the same order everywhere, so that none waits for a meeting that the
others skip.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ernie45.config import Environment
from ernie45.errors import ConfigError, ErnieError, RunError

BUCKET_ELEMENTS = 1 << 24
"""Numbers that are added up in one message: 64 MB in float32. Many small tensors would cost a round each."""
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed? ?out|broken pipe|socket", re.IGNORECASE)


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run: `rank` of `world`. The default is a process that is alone.

    `sharded`: each rank is to hold a share of the weights (`parallel.shard`), so that all must run the same number of passes.
    """

    rank: int = 0
    world: int = 1
    sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that talks and writes what is written once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this rank's; all ranks together have each once."""
        return range(self.rank, count, self.world)

    def new_group(self) -> dist.ProcessGroup | None:
        """A channel of its own between the ranks, for what a thread in the background does; None for a process that is alone."""
        group = dist.new_group() if self.world > 1 else None
        assert not isinstance(group, int), "every rank is in it"
        return group

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each number added up over the ranks, in float64: exact for counts, the same for all."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def from_first(self, value: float) -> float:
        """The first rank's number."""
        if self.world == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, src=0)
        return told.item()

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, added in float32 and in the same order for all."""
        if self.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.float().flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every rank the sum of all ranks' gradients. A parameter that no rank learned keeps None, as in one process.

        Gradients of weights in shares are added up in backward already.
        """
        if self.world == 1:
            return
        whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        learned = torch.tensor([parameter.grad is not None for parameter in whole], dtype=torch.int32)
        dist.all_reduce(learned)
        held = [parameter for parameter, count in zip(whole, learned.tolist(), strict=True) if count]
        for parameter in held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add_up([parameter.grad for parameter in held if parameter.grad is not None])

    def in_order(self, digests: Sequence[bytes], count: int) -> list[bytes]:
        """SHA-256 digests of this rank's `share(count)`, together with those of the others, in the order 0 .. count - 1."""
        if self.world == 1:
            return list(digests)
        size = hashlib.sha256().digest_size
        own = torch.zeros(-(-count // self.world) * size, dtype=torch.uint8)
        own[: len(digests) * size] = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8) if digests else 0
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own)
        rows = [bytes(part.tolist()) for part in every]
        return [rows[n % self.world][n // self.world * size :][:size] for n in range(count)]

    def once(self, action: Callable[[], object]) -> None:
        """The first rank acts, the others wait for it. Raises what it raised, on the others as a RunError."""
        if self.world == 1:
            action()
            return
        failed: Exception | None = None
        if self.is_first:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - told to the others, and raised again below
                failed = error
        told: list[str | None] = [None if failed is None else str(failed) or type(failed).__name__]
        dist.broadcast_object_list(told, src=0)
        if failed is not None:
            raise failed
        if told[0] is not None:
            raise RunError(f"rank 0 ended: {told[0]}")


ALONE = Ranks()
"""A process without others."""


@contextmanager
def open_ranks(environment: Environment, timeout: float, *, sharded: bool = False) -> Iterator[Ranks]:
    """Meet the other processes that the launcher started (torchrun sets RANK and WORLD_SIZE); alone, and whole, without one.

    A rank that is killed is noticed at once by those that wait for it, a silent one after `timeout` seconds: then RunError. What a rank
    raises itself passes unchanged. Raises ConfigError when the launcher's numbers make no sense.
    """
    rank, world = environment.rank, environment.world
    if not 0 <= rank < world:
        raise ConfigError(f"the launcher says that this is rank {rank} of {world}; ranks count from 0")
    if world == 1:
        yield ALONE
        return
    with _naming_lost_ranks(rank, world, timeout):
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        yield Ranks(rank, world, sharded)
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def _naming_lost_ranks(rank: int, world: int, timeout: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ErnieError) or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        first = str(error).splitlines()[0]
        raise RunError(
            f"rank {rank} of {world} lost the others: one ended, or was silent for {timeout:g} seconds ({first}); its own message stands "
            "above or in its log. The last checkpoint is whole: start the same command again to go on from it"
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of together at most `BUCKET_ELEMENTS` numbers; a larger one stands alone."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
