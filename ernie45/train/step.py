"""One optimiser step: micro-batches in, a report out. The same text serves one process and several, each with its own micro-batches.

The loss is the mean over the learned labels of the *whole* step: a micro-batch with few labels weighs little, and how the step is cut into
micro-batches, or shared out among ranks, changes nothing. Router losses are means over the micro-batches; they add gradient and never
change the reported loss.
Letters: T tokens, D width.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ernie45.errors import ConfigError
from ernie45.models.text import Decoder
from ernie45.nn.attention import Attend, PackedCausal
from ernie45.nn.rope import turns
from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.parallel.shard import Run, plainly
from ernie45.plan.flops import Learned, Work, step_work
from ernie45.train.batch import TrainBatch
from ernie45.train.cross_entropy import summed_cross_entropy
from ernie45.train.noise import EmbeddingNoise
from ernie45.train.optim import Optimiser
from ernie45.train.router_losses import RouterPass, RouterWatch, load_balance_loss, moved_bias, orthogonal_loss, z_loss


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of what is learned beside the next token; 0 switches a part off. Pre-training of the family: 1e-5, 1e-3, 0, 0.3, 1e-3."""

    balance: float = 0.0
    """Of the load-balance loss."""
    orthogonal: float = 0.0
    """Of the router orthogonal loss."""
    z: float = 0.0
    """Of the router z-loss."""
    mtp: float = 0.3
    """Of the multi-token prediction loss, in models that have the block."""
    bias_rate: float = 0.0
    """By how much the selection bias of an expert moves per step."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"losses.{name} must be a number of at least 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What happened in one step. Losses are means per learned label; `load` is each expert's choices over an even share, layer by layer."""

    step: int
    loss: float
    rate: float
    norm: float
    tokens: int
    learned: int
    seconds: float
    skipped: bool = False
    mtp_loss: float | None = None
    balance_loss: float | None = None
    orthogonal_loss: float | None = None
    z_loss: float | None = None
    load: tuple[tuple[float, ...], ...] | None = None
    margin: float | None = None
    """Preferences: mean of beta x (how much more than the reference the chosen answer is preferred)."""
    held_out_loss: float | None = None
    """Mean loss per label on rows that are not learned from, after this step."""
    work: float | None = None
    """Operations of the step that the model needs, of all ranks."""
    layer_work: float | None = None
    """Operations of one forward pass of the layers in it: what computing them again costs."""
    mfu: float | None = None
    """Share of what the devices can do that went into `work`."""
    hfu: float | None = None
    """The same of all that was done, what was computed again included."""
    memory: dict[str, int] | None = None
    """Bytes of this rank by kind, after the first step of a process."""
    accuracy: float | None = None
    """Preferences: share of pairs whose chosen answer is the one preferred."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for one line of a log; what was not measured is left out."""
        data = {key: value for key, value in asdict(self).items() if value is not None}
        return data | {"tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1)}


class _Counts(NamedTuple):
    """Of a whole step: learned labels, those of the multi-token predictor, tokens, micro-batches, pairs of tokens that see each other."""

    learned: int
    mtp_learned: int
    tokens: int
    batches: int
    pairs: int


class Step:
    """How one model learns from one batch after the other."""

    def __init__(
        self,
        decoder: Decoder,
        optimiser: Optimiser,
        losses: LossConfig,
        *,
        recompute: bool = False,
        noise: EmbeddingNoise | None = None,
        ranks: Ranks = ALONE,
        run: Run = plainly,
        keep: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.decoder, self.optimiser, self.losses, self.recompute, self.noise = decoder, optimiser, losses, recompute, noise
        self.ranks, self.run, self.keep = ranks, run, keep
        self.watch = RouterWatch(decoder, want_logits=losses.balance > 0 or losses.z > 0)

    def __call__(self, batches: Sequence[TrainBatch], step: int, rate: float) -> StepReport:
        """Learn from micro-batches that together are one step, or this rank's of them.

        A step whose gradient is not finite is skipped, by all ranks, and the report says so.
        """
        start = time.perf_counter()
        counts = self._counts(batches)
        work = self._work(counts)
        if not counts.learned:
            raise ConfigError("a step has no learned label in any of its documents; check which parts of the data are learned")
        sums = dict.fromkeys(("loss", "mtp", "balance", "z"), 0.0)
        for number, batch in zip(self.ranks.share(counts.batches), batches, strict=True):
            with self.keep():
                self.run(self._losses, batch, (step, number), counts, sums).backward()
        self.ranks.add_gradients(list(self.optimiser.parameters.values()))
        orthogonal = self._learn_orthogonal()
        sums, load = self._together(sums)
        norm = self.ranks.from_first(self.optimiser.gradient_norm())
        skipped = not math.isfinite(norm)
        if skipped:
            self.optimiser.drop_gradients()
        else:
            self.optimiser.step(rate, norm)
            self._move_biases(load)
        return StepReport(
            step=step,
            loss=sums["loss"],
            rate=rate,
            norm=norm,
            tokens=counts.tokens,
            learned=counts.learned,
            seconds=time.perf_counter() - start,
            skipped=skipped,
            mtp_loss=sums["mtp"] if counts.mtp_learned else None,
            balance_loss=sums["balance"] if self.losses.balance else None,
            z_loss=sums["z"] if self.losses.z else None,
            orthogonal_loss=orthogonal,
            load=_shares(load),
            work=work.step,
            layer_work=work.layers,
        )

    def _counts(self, batches: Sequence[TrainBatch]) -> "_Counts":
        """What the step has, of all ranks: every rank's loss is divided by these, so that the gradients only need to be added."""
        mtp_learned = sum(batch.after_next().learned for batch in batches) if self._has_mtp else 0
        learned, tokens, pairs = (sum(values) for values in zip(*((b.learned, b.num_tokens, b.pairs) for b in batches), strict=True))
        return _Counts(*map(int, self.ranks.sums((learned, mtp_learned, tokens, len(batches), pairs))))

    def _work(self, counts: "_Counts") -> Work:
        step = Learned(tokens=counts.tokens, pairs=counts.pairs, head_rows=counts.learned, mtp_rows=counts.mtp_learned)
        return step_work(self.decoder.config, step, weights_learn=self.optimiser.trains_weights)

    def _together(self, sums: dict[str, float]) -> tuple[dict[str, float], list[Tensor]]:
        """The losses of all ranks, and every expert's choices in all of them, int64 [E] a layer."""
        load = self.watch.take_load()
        sizes = [len(counts_E) for counts_E in load]
        values = self.ranks.sums([*sums.values(), *(count for counts_E in load for count in counts_E.tolist())])
        losses = dict(zip(sums, values, strict=False))
        return losses, list(torch.tensor(values[len(sums) :], dtype=torch.int64).split(sizes)) if sizes else []

    @property
    def _has_mtp(self) -> bool:
        return self.decoder.mtp is not None and self.losses.mtp > 0

    def _losses(self, batch: TrainBatch, place: tuple[int, int], counts: "_Counts", sums: dict[str, float]) -> Tensor:
        """All losses of micro-batch (step, number in it), to be learned from; adds what it contributes to `sums`."""
        attend = PackedCausal(list(batch.doc_ends))
        x_TD = self.decoder.embed(batch.tokens_T)
        if self.noise is not None:
            x_TD = self.noise(x_TD, batch.doc_ends, *place)
        with self.watch.recording() as passes:
            h_TD = trunk(self.decoder, x_TD, batch.positions_T, attend, recompute=self.recompute)
        main = self._summed(h_TD, batch.labels_T, 1.0 / counts.learned)
        total = main
        sums["loss"] += main.item()
        if counts.mtp_learned:
            ahead = batch.after_next()
            m_TD = self.decoder.predict_after_next(ahead.next_tokens_T, h_TD, ahead.positions_T, attend)
            mtp = self._summed(m_TD, ahead.labels_T, 1.0 / counts.mtp_learned)
            total = total + self.losses.mtp * mtp
            sums["mtp"] += mtp.item()
        return total + self._router_losses(passes, counts.batches, sums)

    def _summed(self, h_TD: Tensor, labels_T: Tensor, each: float) -> Tensor:
        decoder = self.decoder
        weights_T = torch.full(labels_T.shape, each, dtype=torch.float32)
        return summed_cross_entropy(decoder.norm(h_TD), decoder.head_matrix, labels_T, weights_T, bias_V=decoder.head_bias).total

    def _router_losses(self, passes: list[RouterPass], num_batches: int, sums: dict[str, float]) -> Tensor:
        """The weighted router losses of one micro-batch: means over its layers."""
        total = torch.zeros(())
        for name, weight in (("balance", self.losses.balance), ("z", self.losses.z)):
            if weight and passes:
                parts = [load_balance_loss(p.logits_TE, p.top_k) if name == "balance" else z_loss(p.logits_TE) for p in passes]
                mean = torch.stack(parts).mean() / num_batches
                sums[name] += mean.item()
                total = total + weight * mean
        return total

    def _learn_orthogonal(self) -> float | None:
        """The orthogonal loss depends on the weights alone, so it is taken once a step; its gradient joins the others before clipping."""
        routers = [router.weight for router in self.watch.routers if router.weight.requires_grad]
        if not self.losses.orthogonal or not routers:
            return None
        mean = torch.stack([orthogonal_loss(weight_ED) for weight_ED in routers]).mean()
        (self.losses.orthogonal * mean).backward()
        return mean.item()

    @torch.no_grad()
    def _move_biases(self, load: list[Tensor]) -> None:
        if self.losses.bias_rate:
            for router, counts_E in zip(self.watch.routers, load, strict=True):
                router.selection_bias.copy_(moved_bias(router.selection_bias, counts_E, self.losses.bias_rate))


def _shares(load: list[Tensor]) -> tuple[tuple[float, ...], ...] | None:
    """Each expert's choices over an even share, layer by layer; None without experts."""
    if not load:
        return None
    return tuple(tuple(round(share, 3) for share in (counts_E / counts_E.double().mean()).tolist()) for counts_E in load)


def trunk(decoder: Decoder, x_TD: Tensor, positions_T: Tensor, attend: Attend, *, recompute: bool) -> Tensor:
    """`decoder(x, positions, attend)`; with `recompute` only each layer's input is kept and the layer is computed again in backward."""
    if not recompute:
        return decoder(x_TD, positions_T, attend)
    turns_TP = turns(positions_T, decoder.frequencies_P)
    for layer in decoder.layers:
        x_TD = checkpoint(layer, x_TD, turns_TP, attend, use_reentrant=False)
    return x_TD
