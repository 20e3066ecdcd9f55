"""One optimiser step: micro-batches in, a report out. The same text serves one process and several, each with its own micro-batches.

The loss is the mean over the learned labels of the *whole* step: a micro-batch with few labels weighs little, and how the step is cut into
micro-batches, or shared out among ranks, changes nothing. Router losses are means over the micro-batches; they add gradient and never
change the reported loss. A model that sees has two routers a layer: each modality has losses, load and bias of its own, as means over the
micro-batches that hold such tokens.
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

from ernie45.errors import ConfigError
from ernie45.models.text import Decoder
from ernie45.nn.attention import PackedCausal
from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.parallel.shard import Run, plainly
from ernie45.plan.flops import Learned, Passes, Work, step_work
from ernie45.train.batch import TrainBatch
from ernie45.train.cross_entropy import SummedLoss, summed_cross_entropy
from ernie45.train.forward import trunk, with_pictures
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
    """By how much the selection bias of an expert moves per step; that of a frozen router stays."""
    token_balanced: bool = False
    """Divide by all tokens of a step instead of by its labels, so that a label weighs the same beside few prompt tokens and beside many
    picture tokens (the family's choice for pictures and text together). The reported loss stays the mean per label."""

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
    vision_loss: float | None = None
    """Of the labels in documents with pictures."""
    text_loss: float | None = None
    """Of the others, where there are both."""
    vision_tokens: int | None = None
    """Tokens that went to the vision experts."""
    vision_balance_loss: float | None = None
    vision_orthogonal_loss: float | None = None
    vision_z_loss: float | None = None
    vision_load: tuple[tuple[float, ...], ...] | None = None
    """As `load`, of the vision experts."""
    margin: float | None = None
    """Preferences: mean of beta x (how much more than the reference the chosen answer is preferred)."""
    held_out_loss: float | None = None
    """Mean loss per label, pair or answer on rows that are not learned from, after this step."""
    held_out_accuracy: float | None = None
    """Preferences: `accuracy` of such rows."""
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


_MODALITIES = {"": False, "vision_": True}
"""Prefix of a loss's name, and whether its routers hear seen tokens."""
_SUMS = ("loss", "mtp", "balance", "z", "pictures", "vision_balance", "vision_z")


class _Counts(NamedTuple):
    """Of a whole step: learned labels, those of the multi-token predictor, tokens, micro-batches, pairs of tokens that see each other; and
    of its pictures: micro-batches that have some, labels in their documents, tokens of vision experts, patches, pairs of these.
    """

    learned: int
    mtp_learned: int
    tokens: int
    batches: int
    pairs: int
    seeing: int
    beside_pictures: int
    vision_tokens: int
    patches: int
    patch_pairs: int


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
        """Raises ConfigError for a multi-token predictor in a model that sees: what it is to be given for a picture is not known."""
        self.decoder, self.optimiser, self.losses, self.recompute, self.noise = decoder, optimiser, losses, recompute, noise
        self.ranks, self.run, self.keep = ranks, run, keep
        self.watch = RouterWatch(decoder, want_logits=losses.balance > 0 or losses.z > 0)
        if self._has_mtp and decoder.sight is not None:
            raise ConfigError(
                "the multi-token predictor of a model that sees cannot learn here (no published one has it); set losses.mtp 0"
            )

    def __call__(self, batches: Sequence[TrainBatch], step: int, rate: float) -> StepReport:
        """Learn from micro-batches that together are one step, or this rank's of them.

        A step whose gradient is not finite is skipped, by all ranks, and the report says so.
        """
        start = time.perf_counter()
        counts = self._counts(batches)
        work = self._work(counts)
        if not counts.learned:
            raise ConfigError("a step has no learned label in any of its documents; check which parts of the data are learned")
        sums = dict.fromkeys(_SUMS, 0.0)
        for number, batch in zip(self.ranks.share(counts.batches), batches, strict=True):
            with self.keep():
                loss = self.run(self._losses, batch, (step, number), counts, sums)
                if loss.requires_grad:  # where only the seeing half learns, a batch without pictures teaches nothing
                    loss.backward()
        self.ranks.add_gradients(list(self.optimiser.parameters.values()))
        orthogonal = {name: self._learn_orthogonal(sees) for name, sees in _MODALITIES.items()}
        sums, load = self._together(sums)
        norm = self.ranks.from_first(self.optimiser.gradient_norm())
        skipped = not math.isfinite(norm)
        if skipped:
            self.optimiser.drop_gradients()
        else:
            self.optimiser.step(rate, norm)
            self._move_biases(load)
        text_labels = counts.learned - counts.beside_pictures
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
            orthogonal_loss=orthogonal[""],
            load=_shares(self._of(load, sees=False)),
            vision_loss=sums["pictures"] / counts.beside_pictures if counts.beside_pictures else None,
            text_loss=(sums["loss"] * counts.learned - sums["pictures"]) / text_labels if counts.seeing and text_labels else None,
            vision_tokens=counts.vision_tokens if counts.seeing else None,
            vision_balance_loss=sums["vision_balance"] if self.losses.balance and counts.seeing else None,
            vision_z_loss=sums["vision_z"] if self.losses.z and counts.seeing else None,
            vision_orthogonal_loss=orthogonal["vision_"],
            vision_load=_shares(self._of(load, sees=True)) if counts.seeing else None,
            work=work.step,
            layer_work=work.layers,
        )

    def _counts(self, batches: Sequence[TrainBatch]) -> "_Counts":
        """What the step has, of all ranks: every rank's loss is divided by these, so that the gradients only need to be added."""
        each = []
        for batch in batches:
            mtp_learned, seen = batch.after_next().learned if self._has_mtp else 0, batch.seen
            pictures = (0, 0, 0, 0, 0) if seen is None else (1, batch.beside_pictures, seen.num_vision, len(seen.patches_SC), seen.pairs)
            each.append((batch.learned, mtp_learned, batch.num_tokens, 1, batch.pairs, *pictures))
        return _Counts(*map(int, self.ranks.sums([sum(values) for values in zip(*each, strict=True)])))

    def _work(self, counts: "_Counts") -> Work:
        step = Learned(
            tokens=counts.tokens,
            pairs=counts.pairs,
            head_rows=counts.learned,
            mtp_rows=counts.mtp_learned,
            vision_tokens=counts.vision_tokens,
            patches=counts.patches,
            patch_pairs=counts.patch_pairs,
        )
        vision = self.decoder.sight.config if self.decoder.sight is not None else None
        return step_work(self.decoder.config, step, vision, Passes.of(self.optimiser.parameters))

    def _together(self, sums: dict[str, float]) -> tuple[dict[str, float], list[Tensor]]:
        """The losses of all ranks, and every expert's choices in all of them, int64 [E] a router."""
        load = self.watch.take_load()
        sizes = [len(counts_E) for counts_E in load]
        values = self.ranks.sums([*sums.values(), *(count for counts_E in load for count in counts_E.tolist())])
        losses = dict(zip(sums, values, strict=False))
        return losses, list(torch.tensor(values[len(sums) :], dtype=torch.int64).split(sizes)) if sizes else []

    def _of(self, load: list[Tensor], *, sees: bool) -> list[Tensor]:
        """The load of one modality's routers."""
        return [counts_E for counts_E, router_sees in zip(load, self.watch.sees, strict=True) if router_sees == sees]

    @property
    def _has_mtp(self) -> bool:
        return self.decoder.mtp is not None and self.losses.mtp > 0

    def _losses(self, batch: TrainBatch, place: tuple[int, int], counts: "_Counts", sums: dict[str, float]) -> Tensor:
        """All losses of micro-batch (step, number in it), to be learned from; adds what it contributes to `sums`."""
        attend, seen = PackedCausal(list(batch.doc_ends)), batch.seen
        x_TD = self.decoder.embed(batch.tokens_T)
        if self.noise is not None:
            x_TD = self.noise(x_TD, batch.doc_ends, *place)
        x_TD = with_pictures(self.decoder, x_TD, batch.tokens_T, seen, recompute=self.recompute)
        with self.watch.recording() as passes:
            vision_T = None if seen is None else seen.vision_T
            h_TD = trunk(self.decoder, x_TD, batch.positions_T, attend, vision_T, recompute=self.recompute)
        main = self._summed(h_TD, batch.labels_T, counts.learned, counts.tokens)
        total = main.total
        sums["loss"] += main.nll_T.sum().item() / counts.learned if self.losses.token_balanced else total.item()
        if seen is not None:
            sums["pictures"] += main.nll_T[batch.beside_pictures_T].sum().item()
        if counts.mtp_learned:
            ahead = batch.after_next()
            m_TD = self.decoder.predict_after_next(ahead.next_tokens_T, h_TD, ahead.positions_T, attend)
            mtp = self._summed(m_TD, ahead.labels_T, counts.mtp_learned, counts.tokens)
            total = total + self.losses.mtp * mtp.total
            sums["mtp"] += mtp.nll_T.sum().item() / counts.mtp_learned if self.losses.token_balanced else mtp.total.item()
        return total + self._router_losses(passes, counts, sums)

    def _summed(self, h_TD: Tensor, labels_T: Tensor, learned: int, tokens: int) -> SummedLoss:
        """The sum of what the labels cost, over the number of labels, or of tokens where the loss is balanced by these."""
        decoder = self.decoder
        weights_T = torch.full(labels_T.shape, 1.0 / (tokens if self.losses.token_balanced else learned), dtype=torch.float32)
        return summed_cross_entropy(decoder.norm(h_TD), decoder.head_matrix, labels_T, weights_T, bias_V=decoder.head_bias)

    def _router_losses(self, passes: list[RouterPass], counts: "_Counts", sums: dict[str, float]) -> Tensor:
        """The weighted router losses of one micro-batch: means over the layers of each modality."""
        total = torch.zeros(())
        for prefix, sees in _MODALITIES.items():
            own = [each for each in passes if each.sees == sees]
            for name, weight in (("balance", self.losses.balance), ("z", self.losses.z)):
                if weight and own:
                    parts = [load_balance_loss(p.logits_TE, p.top_k) if name == "balance" else z_loss(p.logits_TE) for p in own]
                    mean = torch.stack(parts).mean() / (counts.seeing if sees else counts.batches)
                    sums[prefix + name] += mean.item()
                    total = total + weight * mean
        return total

    def _learn_orthogonal(self, sees: bool) -> float | None:
        """The orthogonal loss depends on the weights alone, so it is taken once a step; its gradient joins the others before clipping."""
        both = zip(self.watch.routers, self.watch.sees, strict=True)
        routers = [router.weight for router, router_sees in both if router_sees == sees and router.weight.requires_grad]
        if not self.losses.orthogonal or not routers:
            return None
        mean = torch.stack([orthogonal_loss(weight_ED) for weight_ED in routers]).mean()
        (self.losses.orthogonal * mean).backward()
        return mean.item()

    @torch.no_grad()
    def _move_biases(self, load: list[Tensor]) -> None:
        if self.losses.bias_rate:
            for router, counts_E in zip(self.watch.routers, load, strict=True):
                if router.weight.requires_grad:
                    router.selection_bias.copy_(moved_bias(router.selection_bias, counts_E, self.losses.bias_rate))


def _shares(load: list[Tensor]) -> tuple[tuple[float, ...], ...] | None:
    """Each expert's choices over an even share, layer by layer; None without experts."""
    if not load:
        return None
    return tuple(tuple(round(share, 3) for share in (counts_E / counts_E.double().mean()).tolist()) for counts_E in load)
