"""Drafts from a smaller model that reads the same text.

It keeps keys and values of its own in the places that the text has in the large one's pages, so what pages share is shared here too. It
reads when it is asked, not before: a text that never has room for drafts costs it nothing. What it has read is known page by page, by a
hash of the text up to the page's end, so a page that has gone to another text is not mistaken for its own.

Letters: T tokens of a pass, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ernie45 import ops
from ernie45.config import Environment
from ernie45.engine.batch import BatchBuilder
from ernie45.engine.cache import PagedCache
from ernie45.engine.drafter import Guess, drafts_of, guessed
from ernie45.engine.sampler import SampleState
from ernie45.engine.scheduler import Plan, PlanRow
from ernie45.errors import ConfigError
from ernie45.models.counts import kv_bytes_per_token
from ernie45.models.load import find_model, load
from ernie45.models.native import native_network
from ernie45.models.text import Decoder
from ernie45.tokens.tokenizer import Tokenizer, load_tokenizer

_AT_ONCE = 256  # tokens of a text that are read in one step; who has more to read gets no draft yet


@dataclass(slots=True)
class _Reading:
    """What of one text is in the cache: `tokens`, in `pages`, all but the first `certain` guessed; `hashes` of full pages, as needed."""

    pages: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    certain: int = 0
    hashes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Draft:
    """A model to guess with: its decoder, its tokenizer, and what it takes of memory in all and in the cache for each token."""

    decoder: Decoder
    tokenizer: Tokenizer | None = None

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(tensor.nbytes for tensor in self.decoder.state_dict().values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in its cache."""
        return kv_bytes_per_token(self.decoder.config, self.decoder.dtype.itemsize)

    def check(self, tokenizer: Tokenizer | None) -> None:
        """Raises `ConfigError` when an id stands for another token there than here."""
        if tokenizer is None or self.tokenizer is None:
            return
        ours, theirs = self.tokenizer, tokenizer
        for id in range(max(ours.vocab_size, theirs.vocab_size)):
            if id >= min(ours.vocab_size, theirs.vocab_size) or ours.token_of(id) != theirs.token_of(id):
                raise ConfigError(
                    f"the draft model has another vocabulary: token {id} is {_named(ours, id)} there and {_named(theirs, id)} in the model "
                    "it would guess for; take a smaller model of the same family"
                )


def load_draft(name: str, environment: Environment, dtype: str = "auto") -> Draft:
    """A folder or a published name, loaded to guess with. Raises `CheckpointError` or `ConfigError`."""
    path = find_model(name, environment)
    if path.suffix == ".gguf":
        raise ConfigError(f"draft_model is {path.name}; a GGUF file cannot draft yet: give a model folder")
    loaded = load(path, dtype=dtype, mtp=False, compact=True, text_only=True, environment=environment)
    return Draft(loaded.decoder, load_tokenizer(path))


def check_draft(draft: Draft | None, tokenizer: Tokenizer | None) -> None:
    """As `Draft.check`, where there is a draft model."""
    if draft is not None:
        draft.check(tokenizer)


def _named(tokenizer: Tokenizer, id: int) -> str:
    return repr(tokenizer.token_of(id)) if id < tokenizer.vocab_size else "none"


class ModelDrafter:
    """A decoder that guesses for another one of the same vocabulary."""

    def __init__(self, decoder: Decoder, vocab_size: int, num_pages: int, page_size: int) -> None:
        """vocab_size and pages: those of the model it guesses for. Raises `ConfigError` when the vocabularies differ in size."""
        if decoder.config.vocab_size != vocab_size:
            raise ConfigError(
                f"the draft model's vocabulary has {decoder.config.vocab_size:,} words, the model's {vocab_size:,}: take one of its family"
            )
        self._decoder = decoder
        self._size = page_size
        self._cache = PagedCache(decoder.config, num_pages, page_size, decoder.dtype)
        self._network = native_network(decoder, ops.KERNELS) if ops.KERNELS is not None else None
        self._batches = BatchBuilder(page_size)
        self._content: list[int | None] = [None] * num_pages
        self._readings: dict[str, _Reading] = {}

    def draft(self, rows: Sequence[PlanRow], states: Mapping[str, SampleState]) -> dict[str, tuple[int, ...]]:
        """As `Drafter.draft`: all requests take their next token in one pass, as many passes as the largest room says."""
        guesses: list[Guess] = []
        unread: list[PlanRow] = []
        for row in rows:
            state = states[row.request_id]
            if not row.room or state.request.pictures or row.start + row.room >= self._decoder.config.max_positions:
                continue
            part = self._unread(row, (*state.request.prompt, *state.output))
            unread.append(part)
            if part.samples:
                guesses.append(Guess(row, state.copy()))
        if not unread:
            return {}
        logits_RV = self._logits(unread)
        going = guessed(guesses, logits_RV) if guesses else []
        while going:
            parts = [
                replace(guess.row, tokens=(guess.tokens[-1],), start=guess.row.start + len(guess.tokens), samples=True) for guess in going
            ]
            for part in parts:
                self._readings[part.request_id].tokens += part.tokens
            going = guessed(going, self._logits(parts))
        return drafts_of(guesses)

    def follow(self, rows: Sequence[PlanRow], hidden_TD: Tensor) -> None:
        """It reads texts, not the large model's states."""

    def forget(self, request_id: str) -> None:
        """A request is over."""
        self._readings.pop(request_id, None)

    def _logits(self, parts: Sequence[PlanRow]) -> Tensor:
        """One pass; float32 logits [R, V] behind the parts that sample."""
        batch = self._batches.build(Plan(tuple(parts)))
        ends = [span.end - 1 for part, span in zip(parts, batch.spans, strict=True) if part.samples]
        if self._network is not None:
            done = self._network.step(batch.tokens_T, batch.positions_T, batch.slots_T, self._cache.store, batch.places_R3, batch.pages_RP,
                                      self._size, torch.tensor(ends, dtype=torch.int64))  # fmt: skip
            if done.logits_RV is not None:
                return done.logits_RV
            h_TD = done.hidden_TD
        else:
            h_TD = self._decoder(self._decoder.embed(batch.tokens_T), batch.positions_T, self._cache.attend(batch))
        return self._decoder.logits(h_TD[ends]).float()

    def _unread(self, row: PlanRow, text: Sequence[int]) -> PlanRow:
        """What is to be read next of a text, in the pages of `row`; it samples where that is all."""
        reading = self._readings.setdefault(row.request_id, _Reading())
        self._agree(reading, row, text)
        start = min(len(reading.tokens), len(text) - 1)
        end = min(len(text), start + _AT_ONCE)
        reading.tokens[start:] = text[start:end]
        reading.certain = end
        self._hash(reading, text, end // self._size)
        for page, known in zip(row.pages, reading.hashes[: end // self._size], strict=False):
            self._content[page] = known
        return replace(row, tokens=tuple(text[start:end]), start=start, samples=end == len(text))

    def _agree(self, reading: _Reading, row: PlanRow, text: Sequence[int]) -> None:
        """Forgets what was guessed wrong; on other pages than before, begins with those that hold the text already."""
        used = -(-len(reading.tokens) // self._size)
        if reading.pages[:used] == row.pages[:used]:
            reading.pages = row.pages
            right = reading.certain
            while right < min(len(reading.tokens), len(text)) and reading.tokens[right] == text[right]:
                right += 1
            del reading.tokens[right:]
            return
        full = (len(text) - 1) // self._size
        self._hash(reading, text, full)
        held = 0
        while held < full and self._content[row.pages[held]] == reading.hashes[held]:
            held += 1
        reading.pages, reading.tokens = row.pages, list(text[: held * self._size])

    def _hash(self, reading: _Reading, text: Sequence[int], count: int) -> None:
        """Makes the hashes of the first `count` pages of a text, which only grows."""
        size, hashes = self._size, reading.hashes
        while len(hashes) < count:
            parent = hashes[-1] if hashes else 0
            hashes.append(hash((parent, tuple(text[len(hashes) * size : (len(hashes) + 1) * size]))))
