"""Learning from pairs: one row holds the prompt once and both answers, of which neither sees the other.

Positions of both answers follow the prompt's, attention is `BranchedCausal`; log-probabilities equal those of two separate rows. Letters:
T tokens, P pairs, D width.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie45.errors import DataError, ErnieError
from ernie45.models.text import Decoder
from ernie45.nn.attention import BranchedCausal
from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.tokens.template import IGNORED, ChatTemplate
from ernie45.train.batch import plan_packs
from ernie45.train.cross_entropy import token_log_probs
from ernie45.train.examples import permutation
from ernie45.train.optim import Optimiser
from ernie45.train.preference_losses import Pairs, PreferenceConfig, preference_loss
from ernie45.train.records import Preference, Record
from ernie45.train.step import StepReport, trunk


@dataclass(frozen=True)
class PairExample:
    """Ids and labels (in place, as `Prompt` has them) of a shared prefix and of the two ways it goes on.

    The last token of the prompt opens both branches, because it predicts the first token of each.
    """

    prefix: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    chosen_labels: tuple[int, ...]
    rejected_labels: tuple[int, ...]
    gap: float

    @property
    def num_tokens(self) -> int:
        """Tokens of its row."""
        return len(self.prefix) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class PreferenceBatch:
    """Packed pairs: int64 [T] three times; `groups` are the lengths of prefix, chosen and rejected; `gap` is float32 [P]."""

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    groups: tuple[tuple[int, int, int], ...]
    gap_P: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model."""
        return self.tokens_T.shape[0]


def as_pair(record: Record, template: ChatTemplate) -> PairExample:
    """What the model sees of a pair. Raises DataError naming the row."""
    if not isinstance(record, Preference):
        raise DataError(f"{record.where}: is no preference pair; expected src + tgt + response + sort, or prompt + chosen + rejected")
    try:
        prompts = [
            template.render([*record.prompt, *answer], tools=record.tools or None, add_generation_prompt=False)
            for answer in (record.chosen, record.rejected)
        ]
    except ErnieError as error:
        raise DataError(f"{record.where}: {error}") from None
    if prompts[0].ids == prompts[1].ids:
        raise DataError(f"{record.where}: the chosen and the rejected answer are the same")
    # earlier answers of the prompt are the same in both: only what follows the common prompt is compared
    opening = len(template.render(record.prompt, tools=record.tools or None, add_generation_prompt=True).ids)
    labels = [tuple(label if place >= opening else IGNORED for place, label in enumerate(prompt.labels)) for prompt in prompts]
    first = [next((place for place, label in enumerate(row) if label != IGNORED), 0) for row in labels]
    if 0 in first:
        raise DataError(f"{record.where}: an answer of the pair is empty, or nothing in it is learned")
    same = next(n for n, (a, b) in enumerate(zip((*prompts[0].ids, -1), (*prompts[1].ids, -2), strict=False)) if a != b)
    cut = max(0, min(same, *first) - 1)
    chosen, rejected = (prompt.ids[cut:] for prompt in prompts)
    return PairExample(prompts[0].ids[:cut], chosen, rejected, labels[0][cut:], labels[1][cut:], record.gap)


def pack_pairs(examples: Sequence[PairExample]) -> PreferenceBatch:
    """Pairs end to end, labels shifted inside each branch."""
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[Tensor] = []
    for e in examples:
        tokens += [*e.prefix, *e.chosen, *e.rejected]
        labels += [*[IGNORED] * len(e.prefix), *e.chosen_labels[1:], IGNORED, *e.rejected_labels[1:], IGNORED]
        start = len(e.prefix)
        positions += [torch.arange(start), torch.arange(start, start + len(e.chosen)), torch.arange(start, start + len(e.rejected))]
    groups = tuple((len(e.prefix), len(e.chosen), len(e.rejected)) for e in examples)
    return PreferenceBatch(
        torch.tensor(tokens), torch.tensor(labels), torch.cat(positions), groups, torch.tensor([e.gap for e in examples])
    )


class PackedPairs:
    """Pairs as batches of at most `limit` tokens, in an order and packing keyed by (seed, epoch)."""

    def __init__(self, examples: Sequence[PairExample], limit: int, seed: int) -> None:
        if not examples:
            raise DataError("there is not one pair to learn from; is the data empty, or was every row left out?")
        self.examples, self.limit, self.seed = examples, limit, seed
        self._epochs: list[list[list[int]]] = []

    def packs(self, epoch: int) -> list[list[int]]:
        """The pairs of each batch of an epoch."""
        while len(self._epochs) <= epoch:
            order = permutation(len(self.examples), self.seed, len(self._epochs)).tolist()
            plans = plan_packs([self.examples[n].num_tokens for n in order], self.limit)
            self._epochs.append([[order[place] for place in plan] for plan in plans])
        return self._epochs[epoch]

    def batch(self, index: int) -> PreferenceBatch:
        """Batch `index` of the endless sequence of epochs."""
        epoch = 0
        while index >= len(self.packs(epoch)):
            index -= len(self.packs(epoch))
            epoch += 1
        return pack_pairs([self.examples[n] for n in self.packs(epoch)[index]])


def make_pairs(
    records: Iterable[Record], template: ChatTemplate, limit: int, on_bad: Callable[[DataError], None] | None = None
) -> list[PairExample]:
    """Every record as a pair of at most `limit` tokens; a bad one raises DataError, or is handed to `on_bad` and left out."""
    made = []
    for record in records:
        try:
            pair = as_pair(record, template)
            if pair.num_tokens > limit:
                raise DataError(f"{record.where}: the pair has {pair.num_tokens:,} tokens, more than the limit of {limit:,}; raise it")
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            made.append(pair)
    return made


def pair_log_probs(decoder: Decoder, batch: PreferenceBatch, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each chosen and each rejected answer, float32 [P] twice, with gradient."""
    attend = BranchedCausal([tuple(group) for group in batch.groups])
    h_TD = trunk(decoder, decoder.embed(batch.tokens_T), batch.positions_T, attend, recompute=recompute)
    logps_T = token_log_probs(decoder.norm(h_TD), decoder.head_matrix, batch.labels_T, bias_V=decoder.head_bias)
    return _by_branch(logps_T, batch)


def _by_branch(values_T: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    parts = values_T.split([length for group in batch.groups for length in group])
    return torch.stack([part.sum() for part in parts[1::3]]), torch.stack([part.sum() for part in parts[2::3]])


@dataclass(frozen=True)
class Reference:
    """The policy that the trained one is compared with: a decoder, used inside `around()` (which may switch adapters off)."""

    decoder: Decoder
    around: Callable[[], AbstractContextManager[None]]

    @torch.no_grad()
    def log_probs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """As `pair_log_probs`, without gradient."""
        with self.around():
            return pair_log_probs(self.decoder, batch)


class PreferenceStep:
    """One optimiser step over pairs: the loss is the mean over the pairs of the whole step, however it is cut into batches or shared out.

    (`kto-pair` compares with the mean drift of a batch, so for it the cut matters.)
    """

    def __init__(
        self,
        decoder: Decoder,
        optimiser: Optimiser,
        config: PreferenceConfig,
        reference: Reference | None,
        *,
        recompute: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        assert (reference is not None) or not config.needs_reference, f"the loss {config.loss} needs a reference"
        self.decoder, self.optimiser, self.config, self.reference = decoder, optimiser, config, reference
        self.recompute, self.ranks = recompute, ranks

    def __call__(self, batches: Sequence[PreferenceBatch], step: int, rate: float) -> StepReport:
        """Learn from the batches of one step, or this rank's of them. A step whose gradient is not finite is skipped by all ranks."""
        start = time.perf_counter()
        own = (
            sum(len(batch.groups) for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(int((batch.labels_T != IGNORED).sum()) for batch in batches),
        )
        num_pairs, tokens, learned = map(int, self.ranks.sums(own))
        loss, margins = 0.0, []
        for batch in batches:
            pairs = self.pairs(batch)
            total = preference_loss(pairs, self.config).sum() / num_pairs
            if self.config.answer:
                total = total - self.config.answer * (pairs.c / pairs.c_tokens).sum() / num_pairs
            total.backward()
            loss += total.item()
            margins.append(self.config.beta * pairs.delta.detach())
        self.ranks.add_gradients(list(self.optimiser.parameters.values()))
        margin_P = torch.cat(margins)
        loss, margin, preferred = self.ranks.sums((loss, margin_P.sum().item(), (margin_P > 0).sum().item()))
        norm = self.ranks.from_first(self.optimiser.gradient_norm())
        skipped = not math.isfinite(norm)
        self.optimiser.drop_gradients() if skipped else self.optimiser.step(rate, norm)
        return StepReport(
            step=step,
            loss=loss,
            rate=rate,
            norm=norm,
            tokens=tokens,
            learned=learned,
            seconds=time.perf_counter() - start,
            skipped=skipped,
            margin=margin / num_pairs,
            accuracy=preferred / num_pairs,
        )

    def pairs(self, batch: PreferenceBatch) -> Pairs:
        """Log-probabilities of policy and reference; without a reference its are 0."""
        c, r = pair_log_probs(self.decoder, batch, recompute=self.recompute)
        c0, r0 = self.reference.log_probs(batch) if self.reference is not None else (torch.zeros_like(c), torch.zeros_like(r))
        tokens = _by_branch((batch.labels_T != IGNORED).float(), batch)
        return Pairs(c, r, c0, r0, *tokens, batch.gap_P)
