"""The engine on a tiny random decoder in float32: what is decided around a request never changes its answer."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.engine.batch import BatchBuilder
from ernie45.engine.cache import PagedAttend, PagedCache
from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.request import FinishReason, Request, SamplingParams
from ernie45.engine.scheduler import Plan, PlanRow
from ernie45.errors import ConfigError, RequestError
from ernie45.machine import available_memory
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.counts import kv_bytes_per_token
from ernie45.models.text import Decoder
from ernie45.ops import reference

EOS = 2
DENSE = TextConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=12, ffn_size=48, vocab_size=67, max_positions=128, rope_theta=1e4
)
VECTORS = dataclasses.replace(DENSE, head_size=16)  # the size the native attention takes
EXPERTS = dataclasses.replace(
    DENSE,
    num_layers=3,
    tie_embeddings=False,
    experts=ExpertsConfig(num_experts=6, top_k=2, expert_size=16, num_shared=2, first_layer=1, last_layer=2),
)


def build(config, seed=0):
    torch.set_num_threads(1)
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(seed), std=0.5)  # wide: ties and near-ties are rare
    return decoder.eval()


@pytest.fixture(scope="module", params=[DENSE, VECTORS, EXPERTS], ids=["dense", "vectors", "experts"])
def decoder(request):
    return build(request.param)


def naive(decoder, prompt, count):
    """Greedy by whole forward passes."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(decoder.prompt_logits(tokens)[-1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def serve(engine, requests):
    """Everything each request got, by id."""
    for request in requests:
        engine.submit(request)
    answers = {request.id: ([], [], [], None) for request in requests}
    while not engine.idle:
        for out in engine.step():
            tokens, logprobs, prompt_logprobs, _ = answers[out.request_id]
            answers[out.request_id] = (
                [*tokens, *out.tokens],
                [*logprobs, *out.logprobs],
                [*prompt_logprobs, *out.prompt_logprobs],
                out.finish,
            )
    engine.verify()
    assert engine.load.free_pages == engine.load.num_pages
    return answers


def prompts(count, stem=9):
    generator = torch.Generator().manual_seed(count)
    shared = torch.randint(3, 67, (stem,), generator=generator).tolist()
    return [shared + torch.randint(3, 67, (1 + 5 * i % 13,), generator=generator).tolist() for i in range(count)]


def ask(i, prompt, **params):
    params = {"max_tokens": 14, "temperature": 0.0} | params
    return Request(id=str(i), prompt=tuple(prompt), params=SamplingParams(**params), eos_ids=(EOS,))


@settings(max_examples=25, deadline=None)
@given(
    budget=st.integers(1, 40),
    running=st.integers(1, 6),
    page=st.sampled_from([1, 2, 3, 8, 16, 32]),
    spare=st.integers(0, 20),
    sharing=st.booleans(),
    late=st.integers(0, 5),
)
def test_greedy_answers_do_not_depend_on_what_is_decided_around_them(decoder, budget, running, page, spare, sharing, late):
    work = [ask(i, prompt) for i, prompt in enumerate(prompts(6))]
    pages = -(-40 // page) + spare
    engine = Engine(
        decoder, EngineConfig(page_size=page, num_pages=pages, token_budget=budget, max_running=running, prefix_sharing=sharing)
    )
    answers = {}
    for request in work[:late]:
        engine.submit(request)
        for out in engine.step():
            answers.setdefault(out.request_id, []).extend(out.tokens)
    for name, (tokens, _, _, finish) in serve_rest(engine, work, late).items():
        answers.setdefault(name, []).extend(tokens)
        assert finish in (FinishReason.length, FinishReason.stop, None)
    for request in work:
        assert answers[request.id] == expected(decoder)[request.id]


def serve_rest(engine, work, late):
    rest = {request.id: ([], [], [], None) for request in work}
    for request in work[late:]:
        engine.submit(request)
    while not engine.idle:
        for out in engine.step():
            rest[out.request_id] = (rest[out.request_id][0] + list(out.tokens), [], [], out.finish)
    engine.verify()
    assert engine.load.free_pages == engine.load.num_pages
    return rest


_EXPECTED = {}


def expected(decoder):
    if decoder not in _EXPECTED:
        _EXPECTED[decoder] = {str(i): naive(decoder, prompt, 14) for i, prompt in enumerate(prompts(6))}
    return _EXPECTED[decoder]


def test_preemption_happens_and_changes_nothing(decoder):
    engine = Engine(decoder, EngineConfig(page_size=4, num_pages=12, token_budget=16, max_running=6))
    answers = serve(engine, [ask(i, prompt) for i, prompt in enumerate(prompts(6))])
    assert engine.load.preemptions > 0
    assert {name: answer[0] for name, answer in answers.items()} == expected(decoder)


@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}])
def test_a_seed_gives_the_same_answer_alone_in_company_and_after_preemption(decoder, penalties):
    work = [ask(i, prompt, temperature=0.9, top_p=0.9, top_k=20 * (i % 2), seed=i, **penalties) for i, prompt in enumerate(prompts(6))]
    alone = {}
    for request in work:
        alone |= serve(Engine(decoder, EngineConfig(num_pages=8)), [request])
    crowded = Engine(decoder, EngineConfig(page_size=4, num_pages=12, token_budget=7, max_running=6))
    assert serve(crowded, work) == alone
    assert crowded.load.preemptions > 0
    other = serve(
        Engine(decoder, EngineConfig(num_pages=8)), [dataclasses.replace(work[0], params=dataclasses.replace(work[0].params, seed=99))]
    )
    assert other["0"][0] != alone["0"][0]


def test_without_a_seed_answers_differ(decoder):
    seeds = iter(range(100))
    engine = Engine(decoder, EngineConfig(num_pages=64), new_seed=lambda: next(seeds))
    answers = serve(engine, [ask(i, [5, 6, 7], temperature=1.5, ignore_eos=True) for i in range(4)])
    assert len({tuple(answer[0]) for answer in answers.values()}) == 4


def test_logprobs_equal_the_full_forward(decoder):
    prompt = prompts(1)[0]
    engine = Engine(decoder, EngineConfig(page_size=4, num_pages=16, token_budget=5))
    ((tokens, logprobs, prompt_logprobs, _),) = serve(engine, [ask(0, prompt, logprobs=3, prompt_logprobs=2, logit_bias={7: 5.0})]).values()
    truth = decoder.prompt_logits([*prompt, *tokens]).double().log_softmax(-1)
    assert len(prompt_logprobs) == len(prompt) - 1
    for place, entry in enumerate(prompt_logprobs + logprobs):
        assert entry.token == [*prompt, *tokens][place + 1]
        assert entry.logprob == pytest.approx(truth[place, entry.token].item(), abs=1e-4)  # float32 sums in another order
        best = truth[place].topk(len(entry.top))
        assert [i for i, _ in entry.top] == best.indices.tolist()
        assert [v for _, v in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert {len(e.top) for e in logprobs} == {3}
    assert {len(e.top) for e in prompt_logprobs} == {2}


def test_cached_decode_equals_the_full_forward(decoder):
    """Three sequences in interleaved chunks over shuffled pages, one of them over consecutive ones; logits agree to float32 rounding."""
    config, size = decoder.config, 4
    cache = PagedCache(config, 32, size, torch.float32)
    builder = BatchBuilder(size)
    sequences = {"a": prompts(3)[0] * 2, "b": prompts(3)[1], "c": prompts(3)[2]}
    tables = {"a": (9, 2, 30, 5, 6, 1), "b": (11, 12, 13, 14, 15), "c": (31, 29, 0, 3, 7)}
    done, got = dict.fromkeys(sequences, 0), {name: [] for name in sequences}
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        while any(done[n] < len(s) for n, s in sequences.items()):
            rows = []
            for name, tokens in sequences.items():
                count = min(int(torch.randint(0, 6, (), generator=generator)), len(tokens) - done[name])
                if count:
                    end = done[name] + count
                    rows.append(PlanRow(name, tuple(tokens[done[name] : end]), done[name], tables[name][: -(-end // size)], samples=False))
                    done[name] = end
            if rows:
                batch = builder.build(Plan(tuple(rows)))
                h_TD = decoder(decoder.embed(batch.tokens_T), batch.positions_T, PagedAttend(cache, batch))
                for row, span in zip(rows, batch.spans, strict=True):
                    got[row.request_id].append(decoder.logits(h_TD[span.first : span.end]))
    for name, tokens in sequences.items():
        truth = decoder.prompt_logits(tokens)
        # logits here reach tens; float32 sums in another order
        assert (torch.cat(got[name]) - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])  # a few units in the last place of 1
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_paged_attention_equals_the_reference(dtype, tolerance, heads):
    N, K = heads
    config = dataclasses.replace(DENSE, num_heads=N, num_kv_heads=K, head_size=16, num_layers=1)
    generator = torch.Generator().manual_seed(3)
    cache, builder = PagedCache(config, 20, 4, dtype), BatchBuilder(4)
    cache.keys[0].fill_(float("nan"))  # whatever lies in slots that are not its own, a row never sees it
    cache.values[0].fill_(float("nan"))
    total = 18
    q, k, v = (torch.randn(total, n, 16, generator=generator).to(dtype) for n in (N, K, K))
    start = 0
    for count in (7, 1, 5, 1, 1, 3):
        end = start + count
        batch = builder.build(Plan((PlanRow("x", tuple(range(count)), start, (3, 8, 9, 1, 19)[: -(-end // 4)], samples=False),)))
        out = PagedAttend(cache, batch)(0, q[start:end], k[start:end], v[start:end])
        truth = reference.causal_attention(q[start:end], k[:end], v[:end])
        assert (out.float() - truth.float()).abs().max() <= tolerance * max(1.0, truth.abs().max().item())
        start = end


def test_cancel_frees_pages_and_leaves_the_others_alone(decoder):
    engine = Engine(decoder, EngineConfig(page_size=4, num_pages=40, token_budget=16))
    work = [ask(i, prompt, ignore_eos=True) for i, prompt in enumerate(prompts(4))]
    for request in work:
        engine.submit(request)
    got = {request.id: [] for request in work}
    for step in range(100):
        if step == 6:
            assert engine.cancel("1")
            assert not engine.cancel("1")
            engine.verify()
        for out in engine.step():
            got[out.request_id] += out.tokens
    assert engine.idle
    assert engine.load.free_pages == 40
    assert len(got["1"]) < 14
    fresh = Engine(decoder, EngineConfig(num_pages=40))
    for name, answer in serve(fresh, [work[0], work[2], work[3]]).items():
        assert got[name] == answer[0]


def test_broken_logits_end_one_request_alone():
    broken = build(dataclasses.replace(DENSE, tie_embeddings=False))
    with torch.no_grad():
        broken.embed.weight[50] = float("nan")
    engine = Engine(broken, EngineConfig(page_size=4, num_pages=40))
    answers = serve(engine, [ask("good", [5, 6, 7, 8, 9], ignore_eos=True), ask("bad", [5, 6, 7, 50, 9, 10])])
    assert answers["bad"] == ([], [], [], FinishReason.error)
    assert answers["good"] == serve(Engine(broken, EngineConfig(num_pages=40)), [ask("good", [5, 6, 7, 8, 9], ignore_eos=True)])["good"]
    assert len(answers["good"][0]) == 14
    again = serve(engine, [ask("next", [5, 6, 7, 8], max_tokens=1)])
    assert again["next"][3] == FinishReason.length


def test_a_step_that_breaks_frees_its_requests_and_the_engine_goes_on(monkeypatch):
    engine = Engine(build(DENSE), EngineConfig(page_size=4, num_pages=40, token_budget=4, idle_budget=4))
    engine.submit(ask("a", range(3, 7)))
    engine.submit(ask("b", range(3, 7)))
    with monkeypatch.context() as patch:
        patch.setattr(PagedAttend, "__call__", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(MemoryError):
            engine.step()
    engine.verify()
    outputs = [out for _ in range(20) for out in engine.step()]
    assert next((out.request_id, out.finish) for out in outputs if out.finish) == ("a", FinishReason.error)
    assert [token for out in outputs for token in out.tokens]
    assert engine.idle
    assert engine.load.free_pages == 40


@pytest.fixture
def choking(decoder, monkeypatch):
    """The decoder, which breaks on a step that holds token 50; how often it has."""
    breaks = []
    embed = decoder.embed.forward

    def checked(tokens_T):
        if (tokens_T == 50).any():
            breaks.append(len(tokens_T))
            raise MemoryError("no memory")
        return embed(tokens_T)

    monkeypatch.setattr(decoder.embed, "forward", checked)
    return breaks


def test_a_row_that_breaks_its_step_ends_alone(decoder, choking):
    told = []
    engine = Engine(decoder, EngineConfig(page_size=4, num_pages=80), on_fault=lambda id, error: told.append((id, str(error))))
    work = [ask(i, range(5 + i, 12 + 2 * i), prompt_logprobs=0, logit_bias={50: -100.0}) for i in range(5)]
    answers = serve(engine, [work[0], ask("bad", [9, 8, 7, 50]), *work[1:]])
    assert answers.pop("bad") == ([], [], [], FinishReason.error)
    assert told == [("bad", "no memory")]
    alone = Engine(decoder, EngineConfig(page_size=4, num_pages=80))
    for request in work:
        ours, theirs = answers[request.id], serve(alone, [request])[request.id]
        assert ours[0] == theirs[0]
        assert [entry.token for entry in ours[2]] == [entry.token for entry in theirs[2]] == list(request.prompt[1:])


def test_who_shares_pages_with_the_row_that_broke_begins_anew(decoder, choking):
    engine = Engine(decoder, EngineConfig(page_size=4, num_pages=80))
    stem = [5, 6, 7, 8, 9, 10, 11, 12]
    bad = ask("bad", [*stem, 50])
    sharing = [ask(i, [*stem, 13, *range(14, 14 + 4 * i)], logit_bias={50: -100.0}) for i in range(2)]
    answers = serve(engine, [bad, *sharing])
    assert answers["bad"][3] == FinishReason.error
    for request in sharing:
        fresh = Engine(decoder, EngineConfig(page_size=4, num_pages=80, prefix_sharing=False))
        assert answers[request.id][0] == serve(fresh, [request])[request.id][0]
    assert len(choking) == 2, "once with all, once alone"


def test_forbidden_ends_and_min_tokens(decoder):
    prompt = prompts(1)[0]
    engine = Engine(decoder, EngineConfig(num_pages=16))
    first = naive(decoder, prompt, 1)[0]
    ((tokens, *_, finish),) = serve(engine, [ask(0, prompt, stop_token_ids=(first,))]).values()
    assert (tokens, finish) == ([first], FinishReason.stop)
    ((tokens, *_),) = serve(engine, [ask(0, prompt, stop_token_ids=(first,), min_tokens=3)]).values()
    assert first not in tokens[:3]
    assert len(tokens) >= 3


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (lambda: ask(0, [5, 67]), "prompt", ("67", "0 to 66")),
        (lambda: ask(0, [5] * 128), "prompt", ("128",)),
        (lambda: ask(0, [5] * 100, max_tokens=60), "max_tokens", ("100", "160", "128", "28")),
        (lambda: ask(0, [5], stop_token_ids=(90,)), "stop_token_ids", ("90",)),
        (lambda: ask(0, [5], logit_bias={80: 1.0}), "logit_bias", ("80",)),
        (lambda: ask(0, [5], bad_words=((1, 70),)), "bad_words", ("70",)),
        (lambda: ask(0, [5], top_k=68), "top_k", ("68", "67")),
    ],
)
def test_the_door(decoder, request_, field, words):
    engine = Engine(decoder, EngineConfig(num_pages=16))
    with pytest.raises(RequestError) as refused:
        engine.submit(request_())
    assert refused.value.field == field
    assert all(word in str(refused.value) for word in words)
    assert engine.idle


def test_automatic_settings_are_resolved_in_the_open():
    per_token = kv_bytes_per_token(DENSE, 4)
    assert per_token == 2 * 2 * 2 * 12 * 4
    resolve = EngineConfig(max_running=4).resolve
    assert resolve(DENSE, torch.float32, 1 << 30).num_pages == 4 * 4  # 4 sequences of 128 in pages of 32
    tight = resolve(DENSE, torch.float32, 2 * 70 * per_token)
    assert (tight.num_pages, tight.max_length) == (2, 64)
    with pytest.raises(ConfigError, match="needs 4 pages"):
        EngineConfig(max_length=128).resolve(DENSE, torch.float32, 2 * 70 * per_token)
    with pytest.raises(ConfigError, match="129"):
        EngineConfig(max_length=129).resolve(DENSE, torch.float32, 1 << 30)
    with pytest.raises(ConfigError, match="page_size"):
        EngineConfig(page_size=0)
    assert available_memory() > 1 << 20


def test_prompt_logprobs_are_told_once_even_after_a_preemption(decoder):
    work = [ask(i, prompt, prompt_logprobs=1, ignore_eos=True) for i, prompt in enumerate(prompts(6))]
    engine = Engine(decoder, EngineConfig(page_size=4, num_pages=12, token_budget=16, max_running=6))
    crowded = serve(engine, work)
    assert engine.load.preemptions > 0
    assert engine.load.cached_tokens == 0
    for request in work:
        alone = serve(Engine(decoder, EngineConfig(num_pages=8)), [request])[request.id]
        got = crowded[request.id]
        assert [e.token for e in got[2]] == list(request.prompt[1:])
        assert [e.logprob for e in got[2]] == pytest.approx([e.logprob for e in alone[2]], abs=1e-4)


def test_a_second_question_finds_the_first_ones_pages(decoder):
    engine = Engine(decoder, EngineConfig(page_size=4, num_pages=40))
    prompt = prompts(1)[0] * 3
    engine.submit(ask("first", prompt))
    told = [out for _ in range(30) for out in engine.step()]
    engine.submit(ask("second", [*prompt, 5, 6]))
    again = [out for _ in range(30) for out in engine.step()]
    assert {out.cached_tokens for out in told} == {0}
    assert {out.cached_tokens for out in again} == {len(prompt) // 4 * 4}
    assert [token for out in again for token in out.tokens] == naive(decoder, [*prompt, 5, 6], 14)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_a_generous_cache_costs_nothing_until_it_is_used():
    before = _resident()
    cache = PagedCache(DENSE, (2 << 30) // (32 * kv_bytes_per_token(DENSE, 4)), 32, torch.float32)
    assert _resident() - before < 50 << 20
    assert cache.keys[1][-1].eq(0).all()
    with pytest.raises(ConfigError, match="num_pages or max_length"):
        PagedCache(DENSE, 1 << 55, 32, torch.float32)


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
