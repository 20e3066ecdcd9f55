"""Learning from pairs: one row holds the prompt once and both answers, of which neither sees the other.

Positions of both answers follow the prompt's, attention is `BranchedCausal`; log-probabilities equal those of two separate rows. Letters:
T tokens, P pairs, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ernie45.errors import DataError, ErnieError
from ernie45.models.text import Decoder
from ernie45.nn.attention import BranchedCausal
from ernie45.parallel.shard import Run, plainly
from ernie45.plan.flops import causal_pairs
from ernie45.tokens.messages import Message
from ernie45.tokens.template import IGNORED, ChatTemplate
from ernie45.train.batch import KnownPicture, Seen, plan_packs
from ernie45.train.comparison import Compared
from ernie45.train.cross_entropy import token_log_probs
from ernie45.train.examples import Batch, check_ids, permutation, seeing
from ernie45.train.forward import states
from ernie45.train.preference_losses import Pairs, PreferenceConfig, preference_loss
from ernie45.train.records import Preference, Record
from ernie45.train.sighted import Gallery


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
    pictures: tuple[KnownPicture, ...] = ()
    """What placeholders in the prefix stand for, in order."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Its row: what both share, then the two ways it goes on."""
        return (*self.prefix, *self.chosen, *self.rejected)

    @property
    def num_tokens(self) -> int:
        """Tokens of its row."""
        return len(self.prefix) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class PreferenceBatch:
    """Packed pairs: int64 [T] three times; `groups` are the lengths of prefix, chosen and rejected; `gap` is float32 [P].

    Of single judged answers (`train.unpaired`) the second branch is the mismatched answer, and `good` says which are good, bool [P].
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    groups: tuple[tuple[int, int, int], ...]
    gap_P: Tensor
    good_P: Tensor | None = None
    seen: Seen | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model."""
        return self.tokens_T.shape[0]

    @property
    def num_compared(self) -> int:
        """P."""
        return len(self.groups)

    @property
    def pairs(self) -> int:
        """Pairs of tokens that see each other: a branch sees the prefix and itself."""
        return sum(causal_pairs(group) + prefix * sum(branches) for group in self.groups for prefix, *branches in [group])


def as_pair(record: Record, template: ChatTemplate, gallery: Gallery | None = None) -> PairExample:
    """What the model sees of a pair; gallery: reads the pictures of its prompt. Raises DataError naming the row."""
    if not isinstance(record, Preference):
        raise DataError(f"{record.where}: is no preference pair; expected src + tgt + response + sort, or prompt + chosen + rejected")
    prompt, pictures = look_at_prompt(record.prompt, (record.chosen, record.rejected), gallery, record.where)
    try:
        prompts = [
            template.render([*prompt, *answer], tools=record.tools or None, add_generation_prompt=False)
            for answer in (record.chosen, record.rejected)
        ]
    except ErnieError as error:
        raise DataError(f"{record.where}: {error}") from None
    if prompts[0].ids == prompts[1].ids:
        raise DataError(f"{record.where}: the chosen and the rejected answer are the same")
    # earlier answers of the prompt are the same in both: only what follows the common prompt is compared
    opening = len(template.render(prompt, tools=record.tools or None, add_generation_prompt=True).ids)
    labels = [tuple(label if place >= opening else IGNORED for place, label in enumerate(prompt.labels)) for prompt in prompts]
    first = [next((place for place, label in enumerate(row) if label != IGNORED), 0) for row in labels]
    if 0 in first:
        raise DataError(f"{record.where}: an answer of the pair is empty, or nothing in it is learned")
    same = next(n for n, (a, b) in enumerate(zip((*prompts[0].ids, -1), (*prompts[1].ids, -2), strict=False)) if a != b)
    cut = max(0, min(same, *first) - 1)
    chosen, rejected = (prompt.ids[cut:] for prompt in prompts)
    return PairExample(prompts[0].ids[:cut], chosen, rejected, labels[0][cut:], labels[1][cut:], record.gap, pictures)


def look_at_prompt(
    prompt: Sequence[Message], answers: Sequence[Sequence[Message]], gallery: Gallery | None, where: str
) -> tuple[tuple[Message, ...], tuple[KnownPicture, ...]]:
    """The prompt of compared answers with its media measured, and their pictures.

    Raises DataError for pictures in what follows the prompt, and where the model reads text alone.
    """
    if any(message.media for answer in answers for message in answer):
        raise DataError(f"{where}: a picture stands behind the first answer; in compared answers pictures stand in the prompt")
    if not any(message.media for message in prompt):
        return tuple(prompt), ()
    return seeing(gallery, where).look(prompt, where)


def pack_pairs(examples: Sequence[PairExample], gallery: Gallery | None = None) -> PreferenceBatch:
    """Pairs end to end, labels shifted inside each branch. gallery: reads the pictures of prompts."""
    tokens: list[int] = []
    labels: list[int] = []
    for e in examples:
        tokens += [*e.prefix, *e.chosen, *e.rejected]
        labels += [*[IGNORED] * len(e.prefix), *e.chosen_labels[1:], IGNORED, *e.rejected_labels[1:], IGNORED]
    groups = tuple((len(e.prefix), len(e.chosen), len(e.rejected)) for e in examples)
    tokens_T, known = torch.tensor(tokens), [picture for e in examples for picture in e.pictures]
    seen = gallery.see(tokens_T, known) if gallery is not None and known else None
    positions = [part for e in examples for part in _positions(e, None if seen is None else gallery)]
    return PreferenceBatch(tokens_T, torch.tensor(labels), torch.cat(positions), groups, torch.tensor([e.gap for e in examples]), seen=seen)


def _positions(e: PairExample, gallery: Gallery | None) -> list[Tensor]:
    """Of the prefix and of both branches, which go on behind it; three to a token where a picture is in the batch."""
    if gallery is None:
        start, parts = len(e.prefix), [torch.arange(len(e.prefix))]
        return parts + [torch.arange(start, start + len(branch)) for branch in (e.chosen, e.rejected)]
    if not e.prefix:
        return [torch.arange(len(branch))[:, None].expand(-1, 3) for branch in (e.chosen, e.rejected)]
    places = gallery.places(e.prefix, e.pictures)
    behind = [(places.following + torch.arange(len(branch)))[:, None].expand(-1, 3) for branch in (e.chosen, e.rejected)]
    return [places.positions_T3, *behind]


class Sized(Protocol):
    """An example that knows its ids and what it costs."""

    @property
    def ids(self) -> tuple[int, ...]:
        """What the model sees of it."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model for it."""
        ...


X = TypeVar("X", bound=Sized)
B = TypeVar("B", bound=Batch)


class PackedRows(Generic[X, B]):
    """Compared answers as batches of at most `limit` tokens, in an order and packing keyed by (seed, epoch)."""

    def __init__(self, examples: Sequence[X], limit: int, seed: int, pack: Callable[[Sequence[X]], B]) -> None:
        if not examples:
            raise DataError("there is not one answer to learn from; is the data empty, or was every row left out?")
        self.examples, self.limit, self.seed, self.pack = examples, limit, seed, pack
        self._epochs: list[list[list[int]]] = []

    def packs(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch."""
        while len(self._epochs) <= epoch:
            order = permutation(len(self.examples), self.seed, len(self._epochs)).tolist()
            plans = plan_packs([self.examples[n].num_tokens for n in order], self.limit)
            self._epochs.append([[order[place] for place in plan] for plan in plans])
        return self._epochs[epoch]

    def batch(self, index: int) -> B:
        """Batch `index` of the endless sequence of epochs."""
        epoch = 0
        while index >= len(self.packs(epoch)):
            index -= len(self.packs(epoch))
            epoch += 1
        return self.pack([self.examples[n] for n in self.packs(epoch)[index]])


def make_each(
    records: Iterable[Record],
    make: Callable[[Record], Sequence[X]],
    limit: int,
    on_bad: Callable[[DataError], None] | None = None,
    vocabulary: int | None = None,
) -> list[X]:
    """What `make` makes of every record, each of at most `limit` tokens, below `vocabulary` where that is given.

    A bad one raises DataError, or is told to `on_bad`.
    """
    made: list[X] = []
    for record in records:
        try:
            examples = make(record)
            for example in examples:
                if example.num_tokens > limit:
                    raise DataError(f"{record.where}: needs {example.num_tokens:,} tokens, more than the limit of {limit:,}; raise it")
                check_ids(example.ids, vocabulary, record.where)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            made += examples
    return made


def pair_log_probs(decoder: Decoder, batch: PreferenceBatch, recompute: bool = False) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each chosen and each rejected answer, float32 [P] twice, with gradient."""
    attend = BranchedCausal([tuple(group) for group in batch.groups])
    h_TD = states(decoder, batch, attend, recompute=recompute)
    logps_T = token_log_probs(decoder.norm(h_TD), decoder.head_matrix, batch.labels_T, bias_V=decoder.head_bias)
    return by_branch(logps_T, batch)


def by_branch(values_T: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Sums over the rows of each chosen and each rejected answer, [P] twice."""
    parts = values_T.split([length for group in batch.groups for length in group])
    return torch.stack([part.sum() for part in parts[1::3]]), torch.stack([part.sum() for part in parts[2::3]])


@dataclass(frozen=True)
class Reference:
    """The policy that the trained one is compared with: a decoder, used inside `around()` (which may switch adapters off).

    `run` is how a decoder of its own is run that is held in shares.
    """

    decoder: Decoder
    around: Callable[[], AbstractContextManager[None]]
    run: Run = plainly

    @torch.no_grad()
    def log_probs(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """As `pair_log_probs`, without gradient."""
        with self.around():
            return self.run(pair_log_probs, self.decoder, batch)


class PairJudge:
    """What a preference loss says of packed pairs. For `kto-pair` the cut into batches matters: it looks at a batch's mean drift."""

    def __init__(self, decoder: Decoder, config: PreferenceConfig, reference: Reference | None, *, recompute: bool = False) -> None:
        assert (reference is not None) or not config.needs_reference, f"the loss {config.loss} needs a reference"
        self.decoder, self.config, self.reference, self.recompute = decoder, config, reference, recompute

    def __call__(self, batch: PreferenceBatch) -> Compared:
        """The loss and the margin of each pair; the margin is beta x (how much more than the reference the chosen answer is preferred)."""
        pairs = self.pairs(batch)
        losses_P = preference_loss(pairs, self.config)
        if self.config.answer:
            losses_P = losses_P - self.config.answer * pairs.c / pairs.c_tokens
        return Compared(losses_P, self.config.beta * pairs.delta.detach())

    def pairs(self, batch: PreferenceBatch) -> Pairs:
        """Log-probabilities of policy and reference; without a reference its are 0."""
        c, r = pair_log_probs(self.decoder, batch, self.recompute)
        c0, r0 = self.reference.log_probs(batch) if self.reference is not None else (torch.zeros_like(c), torch.zeros_like(r))
        tokens = by_branch((batch.labels_T != IGNORED).float(), batch)
        return Pairs(c, r, c0, r0, *tokens, batch.gap_P)
