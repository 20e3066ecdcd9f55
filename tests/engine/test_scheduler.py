"""The scheduler under random workloads: a model that answers f(prefix) must give the same answer whatever is decided around it."""

import zlib
from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.engine.blocks import PagePool, page_digest, root_digest
from ernie45.engine.request import FinishReason, Request, SamplingParams
from ernie45.engine.scheduler import Plan, Scheduler, SchedulerConfig
from ernie45.errors import ConfigError, RequestError

EOS = 7


def next_token(prefix):
    """The fake model: any change of the prefix changes the answer. One in eleven ends the text."""
    return zlib.crc32(array("I", prefix).tobytes()) % 11


@dataclass
class FakeModel:
    """Keeps what was written into each slot, and answers from what it reads back there, as a cache does."""

    page_size: int
    slots: dict[int, int] = field(default_factory=dict)
    computed: dict[str, list[int]] = field(default_factory=dict)

    def run(self, plan: Plan, right: int = 0) -> dict[str, tuple[int, ...]]:
        """right: so many drafted tokens are right wherever there is room, the others wrong; written they are all."""
        for row in plan.rows:
            self._write(row, row.start, row.tokens)
            self.computed.setdefault(row.request_id, []).extend(range(row.start, row.start + len(row.tokens)))
        known = {row.request_id: self._read(row, row.start + len(row.tokens)) for row in plan.rows if row.samples}
        for row in plan.rows:
            for place in range(row.room):
                token = next_token(known[row.request_id]) if place < right else 10**6 + place
                known[row.request_id].append(token)
                self._write(row, row.start + len(row.tokens) + place, (token,))
        answers = {}
        for row in plan.rows:
            if row.samples:
                end = row.start + len(row.tokens)
                found = [next_token(self._read(row, end))]
                while len(found) <= row.room and found[-1] == self._read(row, end + len(found))[-1]:
                    found.append(next_token(self._read(row, end + len(found))))
                answers[row.request_id] = tuple(found)
        return answers

    def _write(self, row, start, tokens):
        for offset, token in enumerate(tokens):
            page, place = divmod(start + offset, self.page_size)
            self.slots[row.pages[page] * self.page_size + place] = token

    def _read(self, row, length):
        where = (divmod(p, self.page_size) for p in range(length))
        return [self.slots[row.pages[page] * self.page_size + place] for page, place in where]


def alone(request, capacity):
    tokens = list(request.prompt)
    most = request.params.max_tokens or capacity - len(tokens)
    while len(tokens) - len(request.prompt) < most:
        tokens.append(next_token(tokens))
        out = len(tokens) - len(request.prompt)
        if tokens[-1] in request.end_ids and out > request.params.min_tokens:
            break
    return tokens[len(request.prompt) :]


def check_plan(plan, scheduler, config):
    assert plan.num_tokens + sum(row.room for row in plan.rows) <= max(config.token_budget, config.idle_budget or 0)
    assert len({row.request_id for row in plan.rows}) == len(plan.rows) <= config.max_running
    assert not set(plan.preempted) & {row.request_id for row in plan.rows}
    written = set()
    for row in plan.rows:
        end = row.start + len(row.tokens) + row.room
        assert row.tokens
        assert not row.room or (row.samples and len(row.tokens) == 1)
        assert len(row.pages) == -(-end // config.page_size)
        assert len(set(row.pages)) == len(row.pages)
        for position in range(row.start, end):
            slot = (row.pages[position // config.page_size], position % config.page_size)
            assert slot not in written, "two rows write one slot"
            written.add(slot)
    for row in plan.rows:  # a page in two tables is full, and written by at most one of them
        for other in plan.rows:
            for page in set(row.pages) & set(other.pages) if row is not other else ():
                index = row.pages.index(page)
                assert other.pages.index(page) == index
                assert min(row.start + len(row.tokens), other.start + len(other.tokens)) >= (index + 1) * config.page_size
    scheduler.check()


requests = st.builds(
    lambda stem, tail, most, least, ignore, priority, salt, whole: (
        tuple([3] * stem) + tuple(tail),
        SamplingParams(max_tokens=most, min_tokens=min(least, most), ignore_eos=ignore, prompt_logprobs=0 if whole else None),
        priority,
        salt,
    ),
    st.integers(1, 14),
    st.lists(st.integers(0, 2), max_size=6),
    st.integers(1, 12),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from(["", "", "other"]),
    st.sampled_from([False, False, False, True]),
)
configs = st.builds(
    lambda budget, running, page, pages, sharing, idle: SchedulerConfig(
        token_budget=budget,
        max_running=running,
        page_size=page,
        num_pages=max(pages, -(-32 // page)),
        max_length=40,
        prefix_sharing=sharing,
        idle_budget=idle,
    ),
    st.integers(1, 24),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.integers(4, 40),
    st.booleans(),
    st.none() | st.integers(1, 60),
)


@settings(max_examples=250, deadline=None)
@given(st.data(), configs, st.lists(st.tuples(requests, st.integers(0, 6)), min_size=1, max_size=9), st.sampled_from([0, 0, 1, 3, 9]))
def test_every_request_ends_with_its_own_answer(data, config, work, drafts):
    scheduler, model = Scheduler(config), FakeModel(config.page_size)
    waiting = [Request(id=str(i), prompt=p, params=s, eos_ids=(EOS,), priority=q, cache_salt=c) for i, ((p, s, q, c), _) in enumerate(work)]
    delays = [delay for _, delay in work]
    answers = {request.id: [] for request in waiting}
    ends, cancelled, alive, counted = {}, set(), {}, {}
    for _ in range(4000):
        while waiting and (delays[0] <= 0 or scheduler.idle):
            request = waiting.pop(0)
            delays.pop(0)
            scheduler.add(request)
            alive[request.id] = request
        delays[:1] = [d - 1 for d in delays[:1]]
        if scheduler.idle and not waiting:
            break
        plan = scheduler.plan(dict.fromkeys(scheduler.decoding, drafts))
        check_plan(plan, scheduler, config)
        for lost in plan.preempted:
            counted[lost] = None
        for row in plan.rows:  # each position once, one after another, from what was shared; afresh after a preemption
            last = counted.get(row.request_id)
            assert row.start == last or last is None
            counted[row.request_id] = row.start + len(row.tokens)
        result = model.run(plan, right=data.draw(st.integers(0, drafts)))
        for row in plan.rows:  # drafted tokens that were right are computed
            counted[row.request_id] += len(result[row.request_id]) - 1 if row.room else 0
        if alive and data.draw(st.integers(0, 19)) == 0:
            victim = data.draw(st.sampled_from(sorted(alive)))
            assert scheduler.cancel(victim)
            cancelled.add(victim)
            del alive[victim]
        for progress in scheduler.commit(plan, result):
            answers[progress.request_id] += progress.tokens
            if progress.finish:
                ends[progress.request_id] = progress.finish
                del alive[progress.request_id]
    assert scheduler.idle, "someone starved"
    scheduler.check()
    assert scheduler.pool.free == config.num_pages
    for i, ((prompt, params, _, _), _) in enumerate(work):
        request = Request(id=str(i), prompt=prompt, params=params, eos_ids=(EOS,))
        expected = alone(request, config.capacity)
        got = answers[request.id]
        if request.id in cancelled:
            assert got == expected[: len(got)]
        else:
            assert got == expected
            assert ends[request.id] == (FinishReason.stop if got[-1] in request.end_ids and len(got) > params.min_tokens else "length")


def small(**changes):
    return SchedulerConfig(**({"token_budget": 8, "max_running": 4, "page_size": 4, "num_pages": 8, "max_length": 64} | changes))


def ask(name, length=8, **params):
    salt, priority = params.pop("salt", ""), params.pop("priority", 0)
    sampling = SamplingParams(**({"max_tokens": 4, "ignore_eos": True} | params))
    return Request(id=name, prompt=tuple(range(length)), params=sampling, cache_salt=salt, priority=priority)


def drain(scheduler, model=None, steps=1000):
    model = model or FakeModel(scheduler.config.page_size)
    plans = []
    while not scheduler.idle and len(plans) < steps:
        plans.append(scheduler.plan())
        scheduler.commit(plans[-1], model.run(plans[-1]))
    return plans


def test_same_work_gives_same_plans():
    def run():
        scheduler = Scheduler(small(num_pages=6))
        for i in range(5):
            scheduler.add(ask(str(i), 5 + i, max_tokens=8))
        return drain(scheduler)

    first = run()
    assert first == run()
    assert any(plan.preempted for plan in first)


def test_decodes_go_before_chunks_and_long_prompts_do_not_stall_them():
    scheduler, model = Scheduler(small(num_pages=20)), FakeModel(4)
    scheduler.add(ask("talk", 4, max_tokens=12))
    scheduler.commit(p := scheduler.plan(), model.run(p))
    scheduler.add(ask("long", 30, salt="x"))
    for _ in range(4):
        plan = scheduler.plan()
        assert [row.request_id for row in plan.rows] == ["talk", "long"]
        assert len(plan.rows[0].tokens) == 1
        assert plan.num_tokens == 8
        scheduler.commit(plan, model.run(plan))


def test_samples_of_one_prompt_share_its_full_pages_in_the_very_first_step():
    scheduler = Scheduler(small(token_budget=32, num_pages=16))
    for i in range(4):
        scheduler.add(ask(f"n{i}", 10))
    rows = scheduler.plan().rows
    assert [row.start for row in rows] == [0, 8, 8, 8]
    assert len({row.pages[:2] for row in rows}) == 1
    assert len({row.pages[2] for row in rows}) == 4


def test_a_whole_prompt_is_never_shared_and_salts_part():
    scheduler, model = Scheduler(small(token_budget=64, num_pages=16)), FakeModel(4)
    for name, salt in (("a", ""), ("b", ""), ("c", "secret")):
        scheduler.add(ask(name, 8, salt=salt, max_tokens=1))
        (plan,) = drain(scheduler, model)
        assert plan.rows[0].start == {"a": 0, "b": 4, "c": 0}[name]
    assert scheduler.load.cached_tokens == 4
    assert scheduler.load.prompt_tokens == 24


def test_priority_and_arrival_set_the_order():
    scheduler = Scheduler(small(max_running=1))
    for name, priority in (("late", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        scheduler.add(ask(name, 4, priority=priority, max_tokens=1))
    assert [plan.rows[0].request_id for plan in drain(scheduler)] == ["urgent", "first", "second", "late"]


def test_the_youngest_is_preempted_and_keeps_what_it_said():
    scheduler, model = Scheduler(small(token_budget=16, num_pages=5)), FakeModel(4)
    scheduler.add(ask("old", 7, max_tokens=12))
    scheduler.add(ask("young", 7, max_tokens=12, salt="x"))
    plans = drain(scheduler, model)
    lost = [plan for plan in plans if plan.preempted]
    assert {name for plan in lost for name in plan.preempted} == {"young"}
    again = next(row for plan in plans[plans.index(lost[0]) :] for row in plan.rows if row.request_id == "young")
    assert len(again.tokens) + again.start > 7, "prompt and output are computed again"


@pytest.mark.parametrize(
    ("length", "most", "field", "numbers"),
    [(64, None, "prompt", ("64", "32")), (30, 3, "max_tokens", ("30", "33", "32", "2")), (32, None, "prompt", ("32", "one must be left"))],
)
def test_what_can_never_fit_is_refused_with_numbers(length, most, field, numbers):
    with pytest.raises(RequestError) as refused:
        Scheduler(small()).add(ask("x", length, max_tokens=most))
    assert refused.value.field == field
    assert all(number in str(refused.value) for number in numbers)


def test_max_tokens_none_runs_to_the_end_of_the_context():
    scheduler = Scheduler(small(max_length=20))
    scheduler.add(ask("x", 15, max_tokens=None))
    plans = drain(scheduler)
    assert sum(row.samples for plan in plans for row in plan.rows) == 5


def test_ids_are_unique_while_alive_and_unknown_ones_cannot_be_cancelled():
    scheduler = Scheduler(small())
    scheduler.add(ask("x"))
    with pytest.raises(RequestError, match="already alive"):
        scheduler.add(ask("x"))
    assert not scheduler.cancel("y")
    assert scheduler.cancel("x")
    scheduler.add(ask("x"))


def test_a_failed_step_ends_its_requests_and_nobody_finds_its_pages():
    scheduler = Scheduler(small(token_budget=6))
    scheduler.add(ask("in", 9))
    scheduler.add(ask("out", 9))
    plan = scheduler.plan()
    assert [p.finish for p in scheduler.abandon(plan)] == [FinishReason.error]
    scheduler.check()
    assert scheduler.plan().rows[0].start == 0
    scheduler.cancel("out")
    assert scheduler.pool.free == 8


def test_drafts_take_what_is_left_and_give_back_what_was_wrong():
    scheduler = Scheduler(small(token_budget=12, num_pages=6))
    scheduler.add(ask("a", 7, max_tokens=9))
    model = FakeModel(4)
    scheduler.commit(first := scheduler.plan({"a": 3}), model.run(first))
    assert first.rows[0].room == 0, "a prompt is no decode"
    (row,) = (plan := scheduler.plan({"a": 8})).rows
    assert (row.start, row.tokens[0], row.room, len(row.pages)) == (7, row.tokens[0], 5, 4), "half of the budget behind its own token"
    scheduler.commit(plan, model.run(plan, right=1))
    assert (scheduler.pool.free, scheduler.decoding) == (3, ("a",)), "ten tokens stand in three pages"
    (row,) = (plan := scheduler.plan({"a": 8})).rows
    assert (row.start, row.room) == (9, 5)
    (progress,) = scheduler.commit(plan, model.run(plan, right=8))
    assert (len(progress.tokens), progress.finish) == (6, FinishReason.length)
    scheduler.check()


def test_nobody_waits_or_is_preempted_for_a_draft():
    scheduler = Scheduler(small(token_budget=64, num_pages=4))
    scheduler.add(ask("a", 7, max_tokens=2))
    scheduler.add(ask("b", 7, max_tokens=2))
    model = FakeModel(4)
    scheduler.commit(plan := scheduler.plan(), model.run(plan))
    plan = scheduler.plan({"a": 8, "b": 8})
    assert [(row.request_id, row.room, len(row.pages)) for row in plan.rows] == [("a", 0, 2), ("b", 0, 2)], "one token is left of either"
    assert not plan.preempted


def test_pages_that_drafts_filled_are_known_when_they_were_right():
    scheduler = Scheduler(small(token_budget=64))
    model = FakeModel(4)
    scheduler.add(ask("a", 7, max_tokens=6))
    scheduler.commit(plan := scheduler.plan(), model.run(plan))
    scheduler.commit(plan := scheduler.plan({"a": 4}), model.run(plan, right=4))
    (text,) = [model._read(row, row.start + 1 + row.room) for row in plan.rows]
    assert len(text) == 12
    scheduler.add(Request(id="b", prompt=(*text, 1), params=SamplingParams(max_tokens=1)))
    (row,) = [row for row in scheduler.plan().rows if row.request_id == "b"]
    assert row.start == 12


def test_a_step_is_larger_while_no_answer_is_being_written():
    scheduler, model = Scheduler(small(token_budget=8, idle_budget=24, num_pages=32)), FakeModel(4)
    for i in range(4):
        scheduler.add(ask(f"n{i}", 10, salt=str(i), max_tokens=2))
    sizes, alone = [], []
    while not scheduler.idle:
        plan = scheduler.plan()
        sizes.append(plan.num_tokens)
        alone.append(not any(len(row.tokens) == 1 for row in plan.rows))
        scheduler.commit(plan, model.run(plan))
    assert sizes[:2] == [24, 8]  # two prompts and a part of the third; then they write, and the third is read beside them
    assert alone[:2] == [True, False]
    assert sum(sizes) == 4 * 11
    assert "(24 while" in scheduler.config.describe()
    assert "while" not in small().describe()


def test_limits_are_checked():
    for name in ("token_budget", "max_running", "page_size", "num_pages", "max_length", "idle_budget"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(ConfigError, match=name):
                small(**{name: value})


def test_pages_come_in_a_row_and_the_longest_unused_known_one_goes_first():
    pool = PagePool(16, 2)
    first = pool.allocate()
    run = [first]
    other = pool.allocate()
    for _ in range(3):
        run.append(pool.allocate(after=run[-1]))
    assert run == list(range(first, first + 4))
    assert abs(other - first) >= 8
    digest = root_digest("")
    names = [digest := page_digest(digest, [i, i]) for i in range(4)]
    for page, name in zip(run, names, strict=True):
        pool.publish(page, name)
    pool.release(run)
    assert pool.find(names) == run
    taken = [pool.allocate() for _ in range(12)]  # eleven blank ones, then the tail of the known prefix
    assert taken[-1] == run[-1]
    assert pool.find(names) == run[:3]
    pool.check()


def test_digests_depend_on_salt_parent_and_tokens():
    root = root_digest("")
    assert len({root, root_digest("s"), page_digest(root, [1, 2]), page_digest(root, [2, 1]), page_digest(root_digest("s"), [1, 2])}) == 5
    with pytest.raises(AssertionError, match="twice"):
        PagePool(2, 1).release([0])
