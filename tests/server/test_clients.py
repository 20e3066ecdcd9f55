"""The clients of OpenAI and Anthropic run unchanged, and read our answers as their own."""

import anthropic
import openai
import pytest

from ernie45.engine.scheduler import SchedulerConfig

ROOMY = SchedulerConfig(token_budget=256, max_running=4, page_size=16, num_pages=512, max_length=4096)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
OPENAI_TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
ANTHROPIC_TOOL = {"name": "weather", "description": "the weather", "input_schema": SCHEMA}
ASK = [{"role": "user", "content": "«Hello wörld»"}]


@pytest.fixture
def ours(serve):
    running = serve(keys=("me:key-for-clients",))
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="key-for-clients", max_retries=0) as client:
        yield client


@pytest.fixture
def thinker(serve):
    running = serve(chat_format="ernie-thinking", engine_limits=ROOMY)
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(serve):
    running = serve(chat_format="ernie-vl-thinking", engine_limits=ROOMY, keys=("me:key-for-clients",))
    with anthropic.Anthropic(base_url=running.url, api_key="key-for-clients", max_retries=0) as client:
        yield client


def test_openai_models(ours):
    assert [model.id for model in ours.models.list()] == ["fake"]
    assert ours.models.retrieve("fake").id == "fake"


def test_openai_chat(ours):
    answer = ours.chat.completions.create(model="fake", messages=ASK)
    assert answer.choices[0].message.content == "Hello wörld"
    chunks = list(ours.chat.completions.create(model="fake", messages=ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello wörld"
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_openai_completions_and_embeddings(ours):
    done = ours.completions.create(model="fake", prompt=["«a»", "«b»"], echo=True, logprobs=1)
    assert [choice.text for choice in done.choices] == ["«a»a", "«b»b"]
    assert done.choices[0].logprobs.tokens[-2:] == ["a", "</s>"]
    whole = ours.embeddings.create(model="fake", input=["one", "two"], encoding_format="float")
    packed = ours.embeddings.create(model="fake", input=["one", "two"])  # the client asks for base64 by itself
    assert len(whole.data) == 2
    assert whole.data[0].embedding == pytest.approx(packed.data[0].embedding, abs=1e-6)
    assert sum(x * x for x in whole.data[0].embedding) == pytest.approx(1)


def test_openai_errors_become_its_exceptions(ours):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ours.chat.completions.create(model="fake", messages=ASK, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        ours.chat.completions.create(model="other", messages=ASK)
    with pytest.raises(openai.AuthenticationError):
        ours.with_options(api_key="wrong").models.list()


def test_openai_parses_schemas_and_calls(thinker):
    answer = thinker.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": f"«hm</think>{CALL}»"}], tools=[OPENAI_TOOL]
    )
    [call] = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    with thinker.chat.completions.stream(
        model="fake",
        messages=[{"role": "user", "content": f"«hm</think>{CALL}»"}],
        tools=[{**OPENAI_TOOL, "function": {**OPENAI_TOOL["function"], "strict": True}}],
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == {"city": "Paris"}


def test_anthropic_messages(claude):
    answer = claude.messages.create(model="fake", max_tokens=100, messages=ASK, thinking={"type": "disabled"})
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == "Hello wörld"
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens == 13


def test_anthropic_stream_with_thinking_and_a_call(claude):
    said = [{"role": "user", "content": f"«I think</think>\n\nLet me see.{CALL}»"}]
    with claude.messages.stream(
        model="fake",
        max_tokens=200,
        messages=said,
        tools=[ANTHROPIC_TOOL],
        thinking={"type": "enabled", "budget_tokens": 1024},
        system="be kind",
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[0].thinking == "I think"
    assert final.content[1].text == "Let me see."
    assert final.content[2].input == {"city": "Paris"}
    assert final.stop_reason == "tool_use"
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    whole = claude.messages.create(model="fake", max_tokens=200, messages=said, tools=[ANTHROPIC_TOOL])
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]


def test_anthropic_results_of_tools_go_back_in(claude):
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "See:"},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}, {"type": "text", "text": "«so»"}],
        },
    ]
    answer = claude.messages.create(model="fake", max_tokens=50, messages=messages, tools=[ANTHROPIC_TOOL], thinking={"type": "disabled"})
    assert answer.content[0].text == "so"


def test_anthropic_stop_sequences_counts_and_choices(claude):
    off = {"type": "disabled"}
    answer = claude.messages.create(model="fake", max_tokens=50, messages=ASK, stop_sequences=["wö"], thinking=off)
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", "wö", "Hello ")
    counted = claude.messages.count_tokens(model="fake", messages=ASK, thinking=off).input_tokens
    assert counted == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    forced = claude.messages.create(
        model="fake", max_tokens=100, messages=ASK, tools=[ANTHROPIC_TOOL], tool_choice={"type": "tool", "name": "weather"}, thinking=off
    )
    assert forced.content[-1].name == "weather"
    begun = claude.messages.create(
        model="fake", max_tokens=50, messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "«on»"}], thinking=off
    )
    assert begun.content[0].text == "on"


def test_anthropic_errors_become_its_exceptions(claude):
    with pytest.raises(anthropic.BadRequestError, match="text only"):
        claude.messages.create(
            model="fake",
            max_tokens=5,
            messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}],
        )
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(model="fake", max_tokens=5, messages=ASK)
    with pytest.raises(anthropic.BadRequestError, match="runs no code"):
        claude.messages.create(model="fake", max_tokens=5, messages=ASK, extra_body={"container": "x"})


def test_tokens_there_and_back(running):
    ids = running.post("/tokenize", {"prompt": "hé</s>"}).json()
    assert ids["count"] == len("hé</s>".encode())
    assert running.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": "hé</s>"}
    assert running.post("/detokenize", {"tokens": [10**6]}).status_code == 400
    made = running.post("/apply_template", {"messages": ASK}).json()
    assert made["prompt"].endswith("<|im_start|>assistant\n")
    assert made["count"] == len(made["tokens"])
    assert running.post("/tokenize", {"prompt": "ab", "return_token_strs": True}).json()["token_strs"] == ["<0x61>", "<0x62>"]


def test_wrong_embeddings(running):
    for fields in ({"dimensions": 3}, {"input": []}, {"input": [10**6]}, {"input": "x" * 600}, {"input": ""}):
        assert running.post("/v1/embeddings", {"input": "x", **fields}).status_code == 400, fields
