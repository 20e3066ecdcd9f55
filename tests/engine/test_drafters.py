"""Models that guess: whatever they guess the answers stay, and where they are right they are heard."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.engine.client import LLM
from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.draft_model import Draft, ModelDrafter
from ernie45.engine.draft_mtp import MtpDrafter
from ernie45.engine.request import SamplingParams
from ernie45.engine.sampler import SampleState
from ernie45.engine.scheduler import PlanRow
from ernie45.engine.speculate import SpeculationConfig
from ernie45.errors import ConfigError
from ernie45.models.text import Decoder
from ernie45.nn.attention import PackedCausal
from tests.engine.test_engine import DENSE, EXPERTS, ask, build, prompts, serve
from tests.engine.tiny_folder import save_tiny

SAME, OTHER = build(DENSE), build(dataclasses.replace(DENSE, num_layers=1, num_heads=2, num_kv_heads=1, max_positions=64), seed=9)
PREDICTING = dataclasses.replace(DENSE, num_mtp=1)


def drafting(decoder, by, draft=None, **config):
    speculation = SpeculationConfig(by=by, draft_model="given" if draft else None, most=5)
    engine = Engine(decoder, EngineConfig(**config, speculation=speculation), draft=draft and Draft(draft))
    engine._speculation.lengths = lambda decoding: dict.fromkeys(decoding, 5)
    return engine


def work(count=6):
    kinds = ({}, {"temperature": 0.8, "top_k": 9}, {"frequency_penalty": 0.6, "repetition_penalty": 1.2})
    return [ask(i, prompt, max_tokens=20, seed=i, **kinds[i % 3]) for i, prompt in enumerate(prompts(count))]


def tokens(answers):
    return {name: answer[0] for name, answer in answers.items()}


def plain(decoder):
    return tokens(serve(Engine(decoder, EngineConfig(num_pages=64)), work()))


PLAIN = plain(SAME)


@settings(max_examples=8, deadline=None)
@given(
    budget=st.integers(2, 60),
    running=st.integers(1, 6),
    page=st.sampled_from([1, 3, 4, 16]),
    spare=st.integers(0, 20),
    sharing=st.booleans(),
    same=st.booleans(),
)
def test_a_draft_model_changes_no_answer(budget, running, page, spare, sharing, same):
    limits = {"page_size": page, "num_pages": -(-48 // page) + spare, "max_running": running, "prefix_sharing": sharing}
    engine = drafting(SAME, "draft", SAME if same else OTHER, token_budget=budget, **limits)
    assert tokens(serve(engine, work())) == PLAIN


def test_a_model_that_guesses_for_itself_is_always_right():
    """Greedy and drawn, through page ends, preemptions and shared pages: its own cache holds what the large model's holds."""
    engine = drafting(SAME, "draft", SAME, page_size=4, num_pages=14, max_running=4)
    outputs = []
    for request in work():
        engine.submit(request)
    while not engine.idle:
        outputs += engine.step()
    assert engine.load.preemptions
    assert sum(out.drafted for out in outputs) == sum(out.accepted for out in outputs) > 40
    for name, found in PLAIN.items():
        assert [token for out in outputs if out.request_id == name for token in out.tokens] == found


def test_a_text_longer_than_the_draft_models_positions_goes_on_without_it():
    request = ask(0, [5, 6, 7] * 20, max_tokens=30, ignore_eos=True)
    expected = serve(Engine(SAME, EngineConfig(num_pages=8)), [request])["0"][0]
    assert serve(drafting(SAME, "draft", OTHER, num_pages=8), [request])["0"][0] == expected


def test_a_long_text_is_read_in_parts(monkeypatch):
    monkeypatch.setattr("ernie45.engine.draft_model._AT_ONCE", 7)
    request = ask(0, prompts(1)[0] * 4, max_tokens=25, ignore_eos=True)
    engine = drafting(SAME, "draft", SAME, num_pages=8)
    engine.submit(request)
    outputs = [out for _ in range(25) for out in engine.step()]
    drafts = [out.drafted for out in outputs]
    assert drafts[1:5] == [0] * 4
    assert sum(drafts) == sum(out.accepted for out in outputs) > 10


def test_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"68 words.*67"):
        ModelDrafter(build(dataclasses.replace(DENSE, vocab_size=68)), 67, 8, 4)
    save_tiny(tmp_path / "large", DENSE)
    save_tiny(tmp_path / "small", dataclasses.replace(DENSE, num_layers=1))
    options = {"num_pages": 16, "speculative": "draft", "draft_model": str(tmp_path / "small")}
    llm = LLM(tmp_path / "large", **options)
    assert llm.generate(["abc"], SamplingParams(max_tokens=4))[0].token_ids
    assert "small" in llm.settings()["drafts"]
    table = (tmp_path / "small" / "tokenizer.json").read_text()
    (tmp_path / "small" / "tokenizer.json").write_text(table.replace('"A":', '"\\u0178":'))
    with pytest.raises(ConfigError, match="another vocabulary: token"):
        LLM(tmp_path / "large", **options)


# ---- the model's own block


def predicting(config=PREDICTING, seed=0):
    return Decoder(config).initialise(torch.Generator().manual_seed(seed), std=0.5).eval()


@settings(max_examples=8, deadline=None)
@given(
    budget=st.integers(2, 60),
    running=st.integers(1, 6),
    page=st.sampled_from([1, 3, 4, 16]),
    spare=st.integers(0, 20),
    sharing=st.booleans(),
)
def test_the_block_changes_no_answer(budget, running, page, spare, sharing):
    decoder = predicting()
    limits = {"page_size": page, "num_pages": -(-48 // page) + spare, "max_running": running, "prefix_sharing": sharing}
    answers = serve(drafting(decoder, "mtp", token_budget=budget, **limits), work())
    assert tokens(answers) == _plain_predicting(decoder)


_KEPT = {}


def _plain_predicting(decoder):
    if "answers" not in _KEPT:
        _KEPT["answers"] = plain(decoder)
    return _KEPT["answers"]


@pytest.mark.parametrize("config", [PREDICTING, dataclasses.replace(EXPERTS, num_mtp=1)], ids=["dense", "experts"])
@torch.inference_mode()
def test_guesses_are_those_of_the_block_over_the_whole_text(config):
    """Prompt in two chunks, then steps of which some drafts were right: the guesses equal one pass of trunk and block over all of it."""
    decoder = predicting(config)
    text = prompts(3)[2] * 2
    drafter = MtpDrafter(decoder, 16, 4)
    state = SampleState.of(ask("a", text[:9]), 0, 67)
    pages = tuple(range(3, 14))
    x_TD = decoder.embed(torch.tensor(text))
    h_TD = decoder(x_TD, torch.arange(len(text)), PackedCausal([len(text)]))

    def told(start, row_tokens, room):
        """What is guessed before a step of these tokens; the step's states are those of the whole text as far as tokens agree."""
        row = PlanRow("a", tuple(row_tokens), start, pages, True, room)
        found = drafter.draft([row], {"a": state})
        states = [h_TD[start + i] if start + i < len(text) and text[start + i] == token else h_TD[0] for i, token in enumerate(row_tokens)]
        drafter.follow([row], torch.stack(states))
        return found.get("a")

    def expected(end):
        """The first guess once `end` tokens are known: whole pass, rows 0 .. end - 2 with the tokens behind them."""
        m_TD = decoder.predict_after_next(torch.tensor(text[1:end]), h_TD[: end - 1], torch.arange(1, end), PackedCausal([end - 1]))
        return int(decoder.logits(m_TD[-1:]).argmax())

    assert told(0, text[:5], 0) is None
    assert told(5, text[5:9], 0) is None
    state.output.append(text[9])
    assert told(9, (text[9], text[10], 1 + text[11] % 60), 3)[0] == expected(10)  # two drafts, of which the first will be right
    state.output += [text[10], text[11]]
    assert told(11, (text[11],), 3)[0] == expected(12)
    state.output.append(text[12])
    assert told(12, (text[12],), 3)[0] == expected(13)


def test_a_trained_block_is_heard():
    """A toy language in which each token says the next two: trunk and block learn it, and most guesses are right."""
    config = dataclasses.replace(PREDICTING, vocab_size=24, num_layers=1)
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.2)
    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(120):
        start = int(torch.randint(3, 24, (), generator=generator))
        text_T = torch.tensor([3 + (start + 5 * i) % 21 for i in range(32)])
        h_TD = decoder(decoder.embed(text_T), torch.arange(32), PackedCausal([32]))
        m_TD = decoder.predict_after_next(text_T[1:31], h_TD[:30], torch.arange(1, 31), PackedCausal([30]))
        loss = torch.nn.functional.cross_entropy(decoder.logits(h_TD[:31]), text_T[1:])
        loss = loss + torch.nn.functional.cross_entropy(decoder.logits(m_TD), text_T[2:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    engine = drafting(decoder.eval(), "mtp", num_pages=8)
    request = ask(0, [3 + (5 * i) % 21 for i in range(9)], max_tokens=22)
    engine.submit(request)
    outputs = []
    while not engine.idle:
        outputs += engine.step()
    assert [token for out in outputs for token in out.tokens] == [3 + (5 * i) % 21 for i in range(9, 31)]
    assert sum(out.accepted for out in outputs) > 0.7 * sum(out.drafted for out in outputs) > 5


def test_a_model_without_the_block_is_refused():
    with pytest.raises(ConfigError, match="no multi-token prediction block"):
        drafting(SAME, "mtp", num_pages=8)
    with pytest.raises(ConfigError, match="leave --quantize out"):
        LLM("starter", quantize="w4a8", speculative="mtp")


def test_the_cache_of_whoever_guesses_is_counted():
    bare = EngineConfig()
    mtp = EngineConfig(speculation=SpeculationConfig(by="mtp"))
    each = bare.bytes_per_token(DENSE, torch.float32)
    assert mtp.bytes_per_token(DENSE, torch.float32) == each * 3 // 2, "one layer beside two"
    draft = Draft(OTHER)
    room = 100 * 2 * (each + draft.bytes_per_token) * 32
    assert bare.resolve(DENSE, torch.float32, room).num_pages > bare.resolve(DENSE, torch.float32, room, draft).num_pages == 100
    assert draft.size == sum(p.numel() * 4 for p in OTHER.parameters())
