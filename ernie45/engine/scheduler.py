"""Which request computes how many tokens into which pages in the next step. A decision is data: no tensors here.

There is no difference between prefill and decode. A sequence is its prompt and what was sampled so far; `computed` of its tokens are in
the cache; the rest waits to be computed, and the logits of the very last one are sampled. A chunk of a prompt, a decode, a shared prefix
and the recomputation after a preemption are the same arithmetic.

Each step hands out a budget of tokens, a larger one when no running sequence is writing its answer, since nobody's next token is then held
up and one large product reads prompts faster than several small ones: first one token to each running sequence that has just one left
(decodes), then chunks to running sequences, then chunks to new ones, always by (priority, arrival). When pages run out the last in that
order gives its pages back and will be computed again. The first in the order is never preempted for another, and a request that could not
fit alone is refused at the door, so every request ends.

A decode may be given room for drafted tokens behind its own (`engine.speculate` says how much is worth while): budget and pages that are
left when everybody has what they need. Nobody waits or is preempted for a guess. Which tokens are drafted is not known here; those that
turn out right come back from the step as further sampled tokens, and the pages of the others are taken back before the next plan.
"""

from bisect import insort
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ernie45.engine.blocks import PagePool, page_digest, root_digest
from ernie45.engine.request import FinishReason, Request
from ernie45.errors import ConfigError, RequestError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step. Raises `ConfigError`.

    token_budget    tokens computed in one step, over all requests
    idle_budget     the same for a step in which no answer is being written; None = token_budget
    max_running     sequences that hold pages at the same time
    max_length      longest sequence, prompt and output together
    """

    token_budget: int
    max_running: int
    page_size: int
    num_pages: int
    max_length: int
    prefix_sharing: bool = True
    idle_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_running", "page_size", "num_pages", "max_length", "idle_budget"):
            value = getattr(self, name)
            if value is None and name == "idle_budget":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")

    def describe(self) -> str:
        """The size of a step, for people."""
        more = f" ({self.idle_budget} while no answer is being written)" if self.idle_budget not in (None, self.token_budget) else ""
        return f"{self.token_budget} tokens{more}, {self.max_running} requests"

    @property
    def capacity(self) -> int:
        """Tokens the longest possible request may have, prompt and output together."""
        return min(self.max_length, self.num_pages * self.page_size)

    def check_fits(self, request: Request) -> int:
        """The request's max_tokens, resolved. Raises `RequestError` with the numbers when it could never be served whole."""
        capacity, prompt, wanted = self.capacity, len(request.prompt), request.params.max_tokens
        reason = "the model's context" if capacity == self.max_length else "the pages of the cache"
        if prompt + 1 > capacity:
            raise RequestError(
                f"the prompt has {prompt} tokens; {reason} has room for {capacity}, and one must be left for the answer", "prompt"
            )
        room = capacity - prompt
        if wanted is not None and wanted > room:
            raise RequestError(
                f"the prompt's {prompt} tokens and max_tokens {wanted} make {prompt + wanted}; {reason} has room for {capacity}: "
                f"ask for at most {room}",
                "max_tokens",
            )
        if request.params.min_tokens > room:
            raise RequestError(f"min_tokens is {request.params.min_tokens}; only {room} tokens fit behind the prompt", "min_tokens")
        return room if wanted is None else wanted


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One request's share of a step: compute `tokens` at positions `start`, `start + 1`, ... into the sequence's `pages`.

    samples: the last token's logits are to be sampled.
    room: so many drafted tokens may follow, and `pages` has places for them.
    """

    request_id: str
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    samples: bool
    room: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Rows are ordered: decodes, then chunks. `preempted` lost their pages and wait again."""

    rows: tuple[PlanRow, ...]
    preempted: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step brought to one request. cached_tokens: prompt tokens that were found in shared pages when it was first admitted."""

    request_id: str
    tokens: tuple[int, ...]
    finish: FinishReason | None
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the scheduler is, for reports. kept_pages: free ones that are known; read_tokens: prompt tokens computed so far."""

    running: int
    waiting: int
    free_pages: int
    kept_pages: int
    num_pages: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    read_tokens: int


@dataclass(slots=True, eq=False)
class _Sequence:
    request: Request
    order: tuple[int, int]
    max_tokens: int
    end_ids: frozenset[int]
    tokens: list[int]
    digests: list[bytes]  # of the full pages whose tokens are known, as far as they were needed
    computed: int = 0
    output: int = 0
    pages: tuple[int, ...] = ()
    published: int = 0
    cached_tokens: int | None = None
    row: PlanRow | None = None  # in the plan that is under way

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.computed


class Scheduler:
    """add / cancel at any time between steps; plan, run the plan elsewhere, commit what was sampled; repeat until idle."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages, config.page_size, config.prefix_sharing)
        self._alive: dict[str, _Sequence] = {}
        self._running: list[_Sequence] = []  # both lists are kept in the order (priority, arrival)
        self._waiting: list[_Sequence] = []
        self._arrivals = 0
        self._preemptions = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._read_tokens = 0

    @property
    def idle(self) -> bool:
        return not self._alive

    @property
    def load(self) -> Load:
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            free_pages=self.pool.free,
            kept_pages=self.pool.kept,
            num_pages=self.pool.num_pages,
            preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            read_tokens=self._read_tokens,
        )

    def check_fits(self, request: Request) -> int:
        """As `SchedulerConfig.check_fits`."""
        return self.config.check_fits(request)

    def has(self, request_id: str) -> bool:
        """Whether a request of this id is alive."""
        return request_id in self._alive

    def add(self, request: Request) -> None:
        """Puts a request into the queue. Raises `RequestError` when its id is alive or it can never fit."""
        if request.id in self._alive:
            raise RequestError(f"a request with the id '{request.id}' is already alive", "id")
        sequence = _Sequence(
            request=request,
            order=(request.priority, self._arrivals),
            max_tokens=self.check_fits(request),
            end_ids=request.end_ids,
            tokens=list(request.prompt),
            digests=[],
        )
        self._arrivals += 1
        self._alive[request.id] = sequence
        insort(self._waiting, sequence, key=_order)

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages. False when it is not alive (it may just have finished)."""
        sequence = self._alive.get(request_id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    @property
    def decoding(self) -> tuple[str, ...]:
        """The requests that compute a single token next, as far as the budget goes."""
        return tuple(s.request.id for s in self._running if s.remaining == 1)

    # ---- one step

    def plan(self, drafts: Mapping[str, int] | None = None) -> Plan:
        """Decides the next step. Without rows there is nothing to do. Every plan is followed by `commit` or `abandon`.

        drafts: how many drafted tokens each decoding request is to have room for, at most.
        """
        rows: list[_Sequence] = []
        preempted: list[str] = []
        decodes = [s for s in self._running if s.remaining == 1]
        budget = self.config.token_budget if decodes else self.config.idle_budget or self.config.token_budget
        spare = min(sum(drafts.values()), max(0, budget - len(decodes)) // 2) if drafts else 0
        budget -= spare
        chunks = [s for s in self._running if s.remaining > 1]
        for sequence in decodes + chunks:
            count = min(budget, sequence.remaining)
            if count == 0 or not sequence.pages:  # pages gone: preempted for an earlier one
                continue
            while sequence.pages and self._lacks_pages(sequence, sequence.computed + count):
                victim = self._running[-1]
                if victim.row is not None:
                    budget += len(victim.row.tokens)
                    rows.remove(victim)
                self._preempt(victim)
                preempted.append(victim.request.id)
            if sequence.pages:
                self._give(sequence, count)
                rows.append(sequence)
                budget -= count
        for sequence in rows:
            self._publish(sequence, sequence.computed + len(_planned(sequence).tokens))
        if not preempted:
            self._admit(rows, budget)
        if drafts and spare:
            self._make_room(rows, drafts, spare)
        planned = tuple(_planned(s) for s in rows)
        assert planned or not self._alive, "requests are alive but nothing can be computed"
        return Plan(planned, tuple(preempted))

    def commit(
        self,
        plan: Plan,
        sampled: Mapping[str, tuple[int, ...]],
        failed: Mapping[str, FinishReason] | None = None,
        undone: Collection[str] = (),
    ) -> tuple[Progress, ...]:
        """Takes in a step's result: tokens for each row that samples, or how it failed (behind the tokens it got before, if any). Who was
        cancelled meanwhile is passed over. Of a row with room, all tokens but the last were drafted, and so are computed already.

        undone: rows that were not computed, since they stand on pages of one that failed; they begin anew, on pages of their own.
        """
        progress, failed = [], failed or {}
        for row in plan.rows:
            sequence = self._alive.get(row.request_id)
            if sequence is None or sequence.row is not row:
                continue
            sequence.row = None
            if row.request_id in undone:
                self._preempt(sequence, spoiled=True)
                continue
            sequence.computed += len(row.tokens)
            self._read_tokens += max(0, min(sequence.computed, len(sequence.request.prompt)) - row.start)
            if row.request_id in failed:
                tokens, _ = self._accept(sequence, sampled.get(row.request_id, ()))
                progress.append(self._progress(sequence, tokens, failed[row.request_id]))
                self._end(sequence, spoiled=True)
            elif row.samples:
                tokens, finish = self._accept(sequence, sampled[row.request_id])
                assert len(tokens) <= 1 + row.room, "more tokens than there was room for"
                progress.append(self._progress(sequence, tokens, finish))
                if row.room:
                    self._keep_right(sequence)
                if finish is not None:
                    self._end(sequence)
        return tuple(progress)

    def abandon(self, plan: Plan) -> tuple[Progress, ...]:
        """The step failed as a whole: its requests end with an error and nobody may find what it wrote."""
        return self.commit(plan, {}, failed={row.request_id: FinishReason.error for row in plan.rows})

    def check(self) -> None:
        """Proves that pages and sequences agree; when idle, that every page is free. For tests and for idle moments."""
        self.pool.check()
        holders = [0] * self.pool.num_pages
        for sequence in self._alive.values():
            for page in sequence.pages:
                holders[page] += 1
        assert all(count == self.pool.holders(page) for page, count in enumerate(holders))
        assert self.pool.free == holders.count(0)
        assert len(self._alive) == len(self._running) + len(self._waiting)

    # ---- parts

    def _lacks_pages(self, sequence: _Sequence, length: int) -> bool:
        return self._pages_for(length) - len(sequence.pages) > self.pool.free

    def _give(self, sequence: _Sequence, count: int) -> None:
        """Plans the next `count` tokens of a sequence and takes the pages they need."""
        start, end = sequence.computed, sequence.computed + count
        self._take_pages(sequence, end)
        tokens = tuple(sequence.tokens[start:end])
        sequence.row = PlanRow(sequence.request.id, tokens, start, sequence.pages, samples=end == len(sequence.tokens))

    def _take_pages(self, sequence: _Sequence, length: int) -> None:
        """Takes pages until the sequence has those of `length` tokens."""
        pages = list(sequence.pages)
        while len(pages) < self._pages_for(length):
            pages.append(self.pool.allocate(after=pages[-1] if pages else None))
        if len(pages) != len(sequence.pages):  # else the same tuple goes on: readers may compare by identity
            sequence.pages = tuple(pages)

    def _publish(self, sequence: _Sequence, length: int) -> None:
        """Makes known the pages that `length` tokens fill. Those of a plan at once: within a step, writing comes before reading, so others
        may share them. Never those of drafted tokens: whether they are right is known after the step."""
        if not self.config.prefix_sharing:
            return
        full = length // self.config.page_size
        self._extend_digests(sequence, full)
        for index in range(sequence.published, full):
            self.pool.publish(sequence.pages[index], sequence.digests[index])
        sequence.published = max(sequence.published, full)

    def _make_room(self, rows: list[_Sequence], drafts: Mapping[str, int], budget: int) -> None:
        """Room for drafted tokens behind decodes, in order, never more than the answer may still have."""
        size = self.config.page_size
        for sequence in rows:
            row = _planned(sequence)
            end = row.start + 1
            if not row.samples or len(row.tokens) > 1:
                continue
            places = (len(sequence.pages) + self.pool.free) * size - end
            count = min(drafts.get(row.request_id, 0), budget, places, sequence.max_tokens - sequence.output - 1)
            if count > 0:
                self._take_pages(sequence, end + count)
                sequence.row = replace(row, pages=sequence.pages, room=count)
                budget -= count

    def _keep_right(self, sequence: _Sequence) -> None:
        """After drafted tokens: all but the newest token is computed; pages beyond it are free again."""
        sequence.computed = len(sequence.tokens) - 1
        self._publish(sequence, sequence.computed)
        needed = self._pages_for(len(sequence.tokens))
        if len(sequence.pages) > needed:
            self.pool.release(sequence.pages[needed:])
            sequence.pages = sequence.pages[:needed]

    def _admit(self, rows: list[_Sequence], budget: int) -> None:
        """Starts waiting sequences, in order, while budget lasts and the whole of each fits beside what the running ones still need."""
        owed = sum(self._pages_for(len(s.tokens)) - len(s.pages) for s in self._running)
        while self._waiting and budget > 0 and len(self._running) < self.config.max_running:
            sequence = self._waiting[0]
            shared = self._shareable(sequence)
            fresh = self._pages_for(len(sequence.tokens)) - len(shared)
            reopened = sum(1 for page in shared if not self.pool.holders(page))
            if fresh + reopened + owed > self.pool.free:
                break
            for page in shared:
                self.pool.hold(page)
            sequence.pages = tuple(shared)
            sequence.published = len(shared)
            sequence.computed = len(shared) * self.config.page_size
            if sequence.cached_tokens is None:
                sequence.cached_tokens = sequence.computed
                self._prompt_tokens += len(sequence.tokens)
                self._cached_tokens += sequence.computed
            count = min(budget, sequence.remaining)
            self._give(sequence, count)
            self._publish(sequence, sequence.computed + count)
            owed += self._pages_for(len(sequence.tokens)) - len(sequence.pages)
            budget -= count
            rows.append(sequence)
            self._waiting.pop(0)
            insort(self._running, sequence, key=_order)

    def _shareable(self, sequence: _Sequence) -> list[int]:
        """Known pages of its beginning; never all of it, since the last token must be computed to be sampled."""
        if not self.config.prefix_sharing or sequence.request.params.prompt_logprobs is not None:
            return []
        full = (len(sequence.tokens) - 1) // self.config.page_size
        self._extend_digests(sequence, full)
        return self.pool.find(sequence.digests[:full])

    def _extend_digests(self, sequence: _Sequence, count: int) -> None:
        size, digests = self.config.page_size, sequence.digests
        while len(digests) < count:
            parent = digests[-1] if digests else root_digest(sequence.request.cache_salt, sequence.request.adapter)
            start, end = len(digests) * size, (len(digests) + 1) * size
            digests.append(page_digest(parent, sequence.tokens[start:end], sequence.request.seen_between(start, end)))

    def _accept(self, sequence: _Sequence, sampled: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """Appends sampled tokens up to the one that ends the answer."""
        for index, token in enumerate(sampled):
            sequence.tokens.append(token)
            sequence.output += 1
            if token in sequence.end_ids and sequence.output > sequence.request.params.min_tokens:
                return sampled[: index + 1], FinishReason.stop
            if sequence.output == sequence.max_tokens:
                return sampled[: index + 1], FinishReason.length
        return sampled, None

    def _preempt(self, sequence: _Sequence, *, spoiled: bool = False) -> None:
        """Takes all pages back; prompt and output will be computed again, as far as they are not still known."""
        self._preemptions += 1
        self._release(sequence, spoiled=spoiled)
        sequence.computed = sequence.published = 0
        sequence.row = None
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_order)

    def _end(self, sequence: _Sequence, *, spoiled: bool = False) -> None:
        del self._alive[sequence.request.id]
        (self._running if sequence.pages else self._waiting).remove(sequence)
        self._release(sequence, spoiled=spoiled)

    def _release(self, sequence: _Sequence, *, spoiled: bool = False) -> None:
        self.pool.release(sequence.pages, spoiled=spoiled)
        sequence.pages = ()

    def _pages_for(self, length: int) -> int:
        return -(-length // self.config.page_size)

    @staticmethod
    def _progress(sequence: _Sequence, tokens: tuple[int, ...], finish: FinishReason | None) -> Progress:
        return Progress(sequence.request.id, tokens, finish, sequence.cached_tokens or 0)


def _order(sequence: _Sequence) -> tuple[int, int]:
    return sequence.order


def _planned(sequence: _Sequence) -> PlanRow:
    assert sequence.row is not None
    return sequence.row
