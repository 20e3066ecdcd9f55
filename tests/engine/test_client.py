"""The text side over a scripted model: its n-th token is the n-th of a script, so every piece of text is known beforehand."""

import json

import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from ernie45.engine.client import LLM
from ernie45.engine.request import FinishReason, SamplingParams
from ernie45.errors import ErnieError, RequestError
from ernie45.models.config import TextConfig
from ernie45.models.text import Decoder
from ernie45.tokens.template import family_template
from ernie45.tokens.tokenizer import load_tokenizer

SPECIAL = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "<tool_output>", "</tool_output>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(
        models.BPE(vocab={char: i + len(SPECIAL) for i, char in enumerate(alphabet)} | {t: i for i, t in enumerate(SPECIAL)}, merges=[])
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(SPECIAL))
    fast.add_tokens(list(TAGS))
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    return load_tokenizer(folder)


class Scripted(Decoder):
    """Says `script` behind the prompt, whose end is known by its length, and the end of the text after it."""

    def __init__(self, script, prompt_length):
        super().__init__(TextConfig(hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_size=4, ffn_size=4, vocab_size=512))
        self.script, self.prompt_length = [*script, 2], prompt_length

    def forward(self, x_TD, positions_T, attend):
        attend(0, *(torch.zeros(len(x_TD), 1, 4) for _ in range(3)))
        return positions_T[:, None].float()

    def logits(self, h_RD):
        places = (h_RD[:, 0].long() + 1 - self.prompt_length).clamp(min=0, max=len(self.script) - 1)
        return torch.nn.functional.one_hot(torch.tensor(self.script)[places], 512).float() * 50


def scripted(tokenizer, says, *, family="ernie-text", question="hi", thinking=None, tools=None, **limits):
    template = family_template(family, tokenizer)
    prompt = template.render([{"role": "user", "content": question}], thinking=thinking, tools=tools)
    script = tokenizer.encode(says, allow_special=True)
    return LLM(Scripted(script, len(prompt.ids)), tokenizer=tokenizer, template=template, num_pages=64, **limits)


def test_chat_says_what_the_model_says(tokenizer):
    llm = scripted(tokenizer, "Grüße, 世界 👋🏽!")
    done = llm.chat("hi", SamplingParams(logprobs=1, prompt_logprobs=0, seed=1))
    assert done.text == "Grüße, 世界 👋🏽!"
    assert (done.reasoning, done.tool_calls, done.finish_reason) == (None, (), FinishReason.stop)
    assert len(done.logprobs) == len(done.token_ids) == len("Grüße, 世界 👋🏽!".encode()) + 1
    assert done.token_ids[-1] == 2
    assert len(done.prompt_logprobs) == done.prompt_tokens - 1
    assert done.timing.prefill > 0
    assert done.timing.tokens_per_second > 0
    assert llm.load.free_pages == 64


def test_a_stream_joined_is_the_answer_and_never_half_a_character(tokenizer):
    llm = scripted(tokenizer, "Grüße, 世界!")
    stream = llm.stream("hi")
    pieces = [delta.text for delta in stream]
    assert "".join(pieces) == stream.completion.text == "Grüße, 世界!"
    assert pieces == list("Grüße, 世界!")


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_answer_across_tokens(tokenizer, include):
    llm = scripted(tokenizer, "one two END three")
    params = SamplingParams(stop=("END", "never"), include_stop_str_in_output=include)
    stream = llm.stream("hi", params)
    assert "".join(delta.text for delta in stream) == ("one two END" if include else "one two ")
    assert stream.completion.finish_reason == FinishReason.stop
    assert len(stream.completion.token_ids) == len("one two END")
    assert llm.load.free_pages == 64
    assert scripted(tokenizer, "say EN").chat("hi", params).text == "say EN"
    late = scripted(tokenizer, "END and END").chat("hi", SamplingParams(stop="END", min_tokens=6))
    assert late.text == "END and "


def test_stop_ids_are_not_shown_unless_asked(tokenizer):
    bang = tokenizer.encode("!")[0]
    assert scripted(tokenizer, "ab!c").chat("hi", SamplingParams(stop_token_ids=(bang,))).text == "ab"
    shown = scripted(tokenizer, "ab!c").chat("hi", SamplingParams(stop_token_ids=(bang,), include_stop_str_in_output=True))
    assert (shown.text, shown.token_ids[-1]) == ("ab!", bang)


def test_reasoning_and_tool_calls_are_told_apart(tokenizer):
    says = 'I wonder.</think>\n\n<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call>\n'
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    llm = scripted(tokenizer, says, family="ernie-thinking", tools=tools)
    done = llm.chat("hi", SamplingParams(stop=("wonder",)), tools=tools)  # stop strings are looked for in the content only
    assert (done.reasoning, done.text) == ("I wonder.", "")
    assert (done.tool_calls[0].name, json.loads(done.tool_calls[0].arguments)) == ("look", {"x": 1})
    assert done.finish_reason == FinishReason.stop


def test_a_thinking_budget_closes_the_block_and_the_answer_follows(tokenizer):
    llm = scripted(tokenizer, "abcdefghi" + "." * 40, family="ernie-thinking", thinking=5)  # fghi: the places that the closing takes
    done = llm.chat("hi", SamplingParams(max_tokens=40, seed=3, logprobs=0), thinking=5)
    assert done.reasoning == "abcde"
    assert done.text == "." * 31
    assert done.finish_reason == FinishReason.length
    assert len(done.token_ids) == len(done.logprobs) == 40
    assert None in done.logprobs
    free = scripted(tokenizer, "abcdefghij" + "." * 9, family="ernie-thinking").chat("hi", SamplingParams(max_tokens=12))
    assert (free.reasoning, free.text) == ("abcdefghij..", "")
    tight = scripted(tokenizer, "abcdefghij", family="ernie-thinking", thinking=5).chat("hi", SamplingParams(max_tokens=6), thinking=5)
    assert (tight.reasoning, tight.finish_reason, len(tight.token_ids)) == ("abcde", FinishReason.length, 5)
    closed = scripted(tokenizer, "abc</think>\n\nfine, fine, fine", family="ernie-thinking", thinking=5)
    assert closed.chat("hi", thinking=5).text == "fine, fine, fine"


def test_leaving_a_stream_early_frees_its_pages_and_two_streams_run_side_by_side(tokenizer):
    llm = scripted(tokenizer, "abcdefgh")
    first, second = llm.stream("hi"), llm.stream("hi")
    for delta in first:
        if delta.text == "c":
            break
    assert first.completion.finish_reason == FinishReason.cancelled
    assert "abc" in first.completion.text
    assert "".join(delta.text for delta in second) == "abcdefgh"
    with llm.stream("hi") as third:
        next(third.steps())
    assert third.completion.finish_reason == FinishReason.cancelled
    assert llm.load.running == llm.load.waiting == 0
    assert llm.load.free_pages == 64


def test_generate_keeps_the_order_and_takes_ids(tokenizer):
    llm = LLM(Scripted(tokenizer.encode("abcdefghijklmnop"), 2), tokenizer=tokenizer, num_pages=64, max_running=2)
    done = llm.generate(["xy", tokenizer.encode("xyz"), "xyzv"], [SamplingParams(max_tokens=n) for n in (3, 2, 1)])
    assert [c.text for c in done] == ["abc", "bc", "c"]
    assert [c.finish_reason for c in done] == [FinishReason.length] * 3
    assert llm.generate("xy", SamplingParams(max_tokens=2))[0].text == "ab"
    assert "".join(delta.text for delta in llm.stream_text("xy", SamplingParams(max_tokens=4))) == "abcd"
    bare = LLM(Scripted([5, 6, 7], 1), num_pages=8)
    assert bare.generate([[1]])[0].token_ids == (5, 6, 7, 2)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda llm: llm.generate(""), "prompt"),
        (lambda llm: llm.generate([[]]), "prompt"),
        (lambda llm: llm.generate([[512]]), "prompt"),
        (lambda llm: llm.generate([[1] * 3000]), "prompt"),
        (lambda llm: llm.generate([5]), "prompt"),
        (lambda llm: llm.generate(["a", "b"], [SamplingParams()]), "params"),
        (lambda llm: llm.generate("a", {"temperature": 1}), "params"),
        (lambda llm: llm.chat("hi"), "messages"),
        (lambda llm: llm.generate(["fine", [600]]), "prompt"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(tokenizer, call, field):
    llm = LLM(Scripted([5], 1), tokenizer=tokenizer, num_pages=64)
    with pytest.raises(RequestError) as refused:
        call(llm)
    assert refused.value.field == field
    assert llm.load.running + llm.load.waiting == 0


def test_without_a_tokenizer_text_is_refused(tokenizer):
    bare = LLM(Scripted([5], 1), num_pages=8)
    for call in (lambda: bare.generate("text"), lambda: bare.generate([[1]], SamplingParams(stop="x"))):
        with pytest.raises(RequestError, match="without a tokenizer"):
            call()
    with pytest.raises(ErnieError):
        scripted(tokenizer, "x").chat([{"role": "nobody", "content": "hi"}])


def test_an_interrupt_in_a_step_ends_its_answers_and_no_more(tokenizer, monkeypatch):
    llm = scripted(tokenizer, "abcdefgh")
    stream = llm.stream("hi")
    other = llm.stream("hi")
    steps = stream.steps()
    next(steps)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scripted, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    assert stream.completion.finish_reason == FinishReason.cancelled
    list(other)
    assert other.completion.finish_reason == FinishReason.error
    assert llm.chat("hi").text == "abcdefgh"
    assert llm.load.free_pages == 64
