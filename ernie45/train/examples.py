"""Records as packed batches: rendered by the template that serving uses, ordered by a keyed permutation, packed without cross-talk.

The sequence of batches depends on the seed and the data alone: batch number i is the same after a resume, and whoever asks for it. The
state of a run over examples is therefore one integer.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from ernie45.errors import DataError, ErnieError
from ernie45.tokens.formats import Segment, media_segments
from ernie45.tokens.messages import Image, Part, Text, Video
from ernie45.tokens.template import ChatTemplate, Prompt, compile_segments
from ernie45.tokens.tokenizer import Tokenizer
from ernie45.train.batch import Example, Seen, TrainBatch, pack, plan_packs
from ernie45.train.picture_rows import Interleaved
from ernie45.train.records import Conversation, Document, Record
from ernie45.train.sighted import Gallery

WINDOW = 512
"""Examples that are packed together: best fit looks no further, so its cost does not grow with the data."""


class Batch(Protocol):
    """What every kind of batch has: the ids the model sees and those it learns, int64 [T] each, and its pictures."""

    @property
    def tokens_T(self) -> Tensor:  # noqa: N802
        """What the model sees."""
        ...

    @property
    def labels_T(self) -> Tensor:  # noqa: N802
        """What each row learns."""
        ...

    @property
    def seen(self) -> Seen | None:
        """What placeholders among the ids stand for."""
        ...


B = TypeVar("B", bound=Batch, covariant=True)


class Batches(Protocol[B]):
    """A sequence of batches that anyone can enter anywhere."""

    def batch(self, index: int) -> B:
        """Batch number `index`, from 0, the same at every call."""
        ...


def as_example(
    record: Record, template: ChatTemplate, tokenizer: Tokenizer, thinking: bool | None = None, gallery: Gallery | None = None
) -> Example:
    """What the model sees of a record and what it learns. Raises DataError naming the row.

    gallery: reads the pictures of rows, for a model that sees; without one a row with pictures is refused.
    """
    if isinstance(record, Document):
        return as_document(record, tokenizer)
    if isinstance(record, Interleaved):
        record = Conversation(record.where, record.messages(), record.tools)
    if not isinstance(record, Conversation):
        raise DataError(f"{record.where}: is a preference pair; this training reads conversations (pairs are for `ernie align`)")
    messages, pictures = record.messages, ()
    if any(message.media for message in messages):
        messages, pictures = seeing(gallery, record.where).look(messages, record.where)
    try:
        # reasoning in the data means that the model is to think
        thinks = thinking if thinking is not None or not any(m.reasoning for m in messages) else _may_think(template)
        prompt: Prompt = template.render(messages, tools=record.tools or None, thinking=thinks, add_generation_prompt=False)
    except ErnieError as error:
        raise DataError(f"{record.where}: {error}") from None
    example = Example(prompt.ids, prompt.labels, pictures)
    if not example.learned:
        raise DataError(f"{record.where}: nothing in it is learned: it has no answer, or every answer is labelled 0")
    return example


def as_document(record: Document | Interleaved, tokenizer: Tokenizer, gallery: Gallery | None = None) -> Example:
    """A text, with pictures in it or without, as pre-training sees it: no chat format around it, the learned texts learned, then the end.

    Raises DataError naming the row.
    """
    if isinstance(record, Document):
        ids = (*tokenizer.encode(record.text), *tokenizer.eos_ids[:1])
        return Example(ids, ids)
    parts, pictures = tuple(passage.part for passage in record.passages), ()
    if any(not isinstance(part, Text) for part in parts):
        parts, pictures = seeing(gallery, record.where).look_at(parts, record.where)
    try:
        prompt = compile_segments(_written(record, parts), tokenizer, lambda turn: True)
    except ErnieError as error:
        raise DataError(f"{record.where}: {error}") from None
    end = tokenizer.eos_ids[:1] if record.passages[-1].learned else ()
    example = Example((*prompt.ids, *end), (*prompt.labels, *end), pictures)
    if not example.learned:
        raise DataError(f"{record.where}: nothing in it is learned: every text has the tag mask")
    return example


def _written(record: Interleaved, parts: Sequence[Part]) -> Iterator[Segment]:
    """The segments of a text with pictures; what is learned stands as an answer's."""
    if record.system:
        yield Segment(f"{record.system}\n")
    counts: dict[type, int] = {Image: 0, Video: 0}
    for part, passage in zip(parts, record.passages, strict=True):
        if isinstance(part, Text):
            yield Segment(part.text, turn=0 if passage.learned else None)
        else:
            counts[type(part)] += 1
            yield from media_segments(part, counts[type(part)])


def seeing(gallery: Gallery | None, where: str) -> Gallery:
    """The gallery of a model that sees. Raises DataError where there is none."""
    if gallery is None:
        raise DataError(f"{where}: has pictures, and this model reads text alone, or was loaded without its vision tower")
    return gallery


def _may_think(template: ChatTemplate) -> bool | None:
    return True if template.family is not None and template.family.thinking == "switch" else None


def make_examples(
    records: Iterable[Record],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    limit: int,
    *,
    thinking: bool | None = None,
    on_bad: Callable[[DataError], None] | None = None,
    gallery: Gallery | None = None,
    vocabulary: int | None = None,
) -> list[Example]:
    """Every record as an example of at most `limit` tokens, each of them below `vocabulary` where that is given.

    One that is longer, or cannot be rendered, raises DataError or is handed to `on_bad` and left out; nothing is cut in silence.
    """
    return checked_examples(records, lambda record: as_example(record, template, tokenizer, thinking, gallery), limit, on_bad, vocabulary)


def checked_examples(
    records: Iterable[Record],
    make: Callable[[Record], Example],
    limit: int,
    on_bad: Callable[[DataError], None] | None = None,
    vocabulary: int | None = None,
) -> list[Example]:
    """As `make_examples`, by any rule of making an example."""
    made = []
    for record in records:
        try:
            example = make(record)
            if len(example.ids) > limit:
                raise DataError(
                    f"{record.where}: has {len(example.ids):,} tokens, more than the limit of {limit:,}; raise it, or leave the row out"
                )
            check_ids(example.ids, vocabulary, record.where)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            made.append(example)
    return made


def check_ids(ids: Sequence[int], vocabulary: int | None, where: str) -> None:
    """Raise DataError when the tokenizer wrote an id that a model with `vocabulary` words has no row for; None: of no model yet."""
    if vocabulary is not None and (largest := max(ids)) >= vocabulary:
        raise DataError(
            f"{where}: holds the id {largest:,}, and the model's vocabulary has {vocabulary:,} words (0 .. {vocabulary - 1:,}): the "
            "tokenizer in the model's folder is larger than the model; put the one there that it was made with"
        )


def permutation(count: int, *key: object) -> np.ndarray:
    """A fixed order of 0 .. count - 1 for a key: by a hash of each number, so that no library's random generator is in it."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


class PackedExamples:
    """Examples, epoch after epoch in a new order, as batches of at most `limit` tokens. Order and packing are keyed by (seed, epoch).

    pack: makes a batch of examples; that of a gallery, where they have pictures.
    """

    def __init__(self, examples: Sequence[Example], limit: int, seed: int, pack: Callable[[Sequence[Example]], TrainBatch] = pack) -> None:
        if not examples:
            raise DataError("there is not one example to learn from; is the data empty, or was every row left out?")
        self.examples, self.limit, self.seed, self._pack = examples, limit, seed, pack
        self._epochs: list[list[list[int]]] = []

    def packs(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch."""
        while len(self._epochs) <= epoch:
            order = permutation(len(self.examples), self.seed, len(self._epochs)).tolist()
            packs: list[list[int]] = []
            for start in range(0, len(order), WINDOW):
                window = order[start : start + WINDOW]
                lengths = [len(self.examples[n].ids) for n in window]
                packs += [[window[place] for place in plan] for plan in plan_packs(lengths, self.limit)]
            self._epochs.append(packs)
        return self._epochs[epoch]

    def count(self, epochs: int) -> int:
        """Batches in the first `epochs` epochs."""
        return sum(len(self.packs(epoch)) for epoch in range(epochs))

    def batch(self, index: int) -> TrainBatch:
        """Batch `index` of the endless sequence of epochs."""
        epoch = 0
        while index >= len(self.packs(epoch)):
            index -= len(self.packs(epoch))
            epoch += 1
        return self._pack([self.examples[n] for n in self.packs(epoch)[index]])


def digest_of(batch: Batch) -> bytes:
    """The SHA-256 of the ids, labels and pixels of one batch."""
    pixels = b"" if batch.seen is None else batch.seen.digest
    return hashlib.sha256(batch.tokens_T.numpy().tobytes() + batch.labels_T.numpy().tobytes() + pixels).digest()


def digest_after(before: str, digests: Iterable[bytes]) -> str:
    """The digest of everything consumed so far, after more batches: equal digests mean equal histories, whoever read which batch."""
    for digest in digests:
        before = hashlib.sha256(bytes.fromhex(before) + digest).hexdigest()
    return before


NO_HISTORY = hashlib.sha256(b"").hexdigest()
"""The digest before the first batch."""
