"""Thinking, responses and tool calls of the ERNIE formats over HTTP: streamed and whole alike, forced, forbidden, budgeted."""

import asyncio
import json

import pytest

from ernie45.engine.scheduler import SchedulerConfig
from ernie45.engine.wire import Stepped

ROOMY = SchedulerConfig(token_budget=256, max_running=4, page_size=16, num_pages=512, max_length=4096)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.fixture
def thinker(serve):
    return serve(chat_format="ernie-thinking", engine_limits=ROOMY)


@pytest.fixture
def switch(serve):
    return serve(chat_format="ernie-vl-thinking", engine_limits=ROOMY)


def joined(chunks):
    """The message that a stream's chunks make up."""
    message = {"content": "", "reasoning_content": "", "reasoning": "", "calls": []}
    finish = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            finish = choice["finish_reason"] or finish
            for name in ("content", "reasoning_content", "reasoning"):
                message[name] += choice["delta"].get(name) or ""
            for call in choice["delta"].get("tool_calls", []):
                if call["index"] == len(message["calls"]):
                    assert call["id"].startswith("call_")
                    message["calls"].append([call["function"]["name"], ""])
                message["calls"][call["index"]][1] += call["function"]["arguments"]
    return message, finish


def test_thinking_and_response_are_told_apart(thinker, events):
    said = "«I wonder\n</think>\n\n<response>\nParis.\n</response>\n»"
    message = thinker.chat(said).json()["choices"][0]["message"]
    assert message["content"] == "Paris."
    assert message["reasoning_content"] == message["reasoning"] == "I wonder"
    streamed, finish = joined(events(thinker.chat(said, stream=True).text)[:-1])
    assert (streamed["content"], streamed["reasoning"], streamed["reasoning_content"]) == ("Paris.", "I wonder", "I wonder")
    assert finish == "stop"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_the_name_of_the_thinking_can_be_set(serve, field):
    running = serve(chat_format="ernie-thinking", reasoning_field=field)
    message = running.chat("«a\n</think>\n\nb»").json()["choices"][0]["message"]
    assert message[field] == "a"
    assert len({"reasoning", "reasoning_content"} & set(message)) == 1


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_both_names_are_read(thinker, field):
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", field: "z"},
        {"role": "user", "content": "«a</think>b»"},
    ]
    assert thinker.post("/v1/chat/completions", {"messages": messages}).json()["choices"][0]["message"]["content"] == "b"


@pytest.mark.parametrize("stream", [True, False])
def test_several_calls(thinker, events, stream):
    response = thinker.chat(f"«hm</think>\n\n{CALL}{CALL}»", tools=TOOLS, stream=stream)
    if stream:
        message, finish = joined(events(response.text)[:-1])
        calls = message["calls"]
    else:
        [choice] = response.json()["choices"]
        finish = choice["finish_reason"]
        assert choice["message"]["content"] is None
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in choice["message"]["tool_calls"]]
    assert finish == "tool_calls"
    assert calls == [["weather", '{"city": "Paris"}']] * 2


def test_arguments_stream_as_they_are_written(thinker, events):
    chunks = events(thinker.chat(f"«</think>{CALL}»", tools=TOOLS, stream=True).text)[:-1]
    pieces = [c["function"]["arguments"] for k in chunks for ch in k["choices"] for c in ch["delta"].get("tool_calls", [])]
    assert len([piece for piece in pieces if piece]) > 5


def test_one_call_at_a_time_when_asked(thinker, until):
    body = thinker.chat(f"«</think>{CALL}{CALL}»", tools=TOOLS, parallel_tool_calls=False).json()
    assert len(body["choices"][0]["message"]["tool_calls"]) == 1
    until(lambda: thinker.engine.fake.idle)


def test_a_call_and_its_result_go_back_in(thinker):
    messages = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain «</think>wet»"},
    ]
    assert thinker.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS}).json()["choices"][0]["message"]["content"] == "wet"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_forced(thinker, choice):
    body = thinker.chat("«never mind</think>just text»", tools=TOOLS, tool_choice=choice, max_tokens=300).json()
    [answer] = body["choices"]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["reasoning"] == "never mind"
    for call in answer["message"]["tool_calls"]:
        assert call["function"]["name"] in ("weather", "clock")
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    if choice != "required":
        assert set(json.loads(answer["message"]["tool_calls"][0]["function"]["arguments"])) == {"city"}


def test_a_call_can_be_forbidden(thinker):
    thinker.chat(f"«</think>{CALL}»", tools=TOOLS, tool_choice="none", max_tokens=5)
    request = thinker.engine.submitted[-1]
    call = thinker.engine.fake.tokenizer.id_of("<tool_call>")
    assert (call,) in request.params.bad_words
    assert "weather" not in thinker.engine.fake.tokenizer.decode(request.prompt[:60])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "none such"}}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "bad name!"}}]}, "tools.0.function.name"),
        ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_cannot_be_called_is_a_400(thinker, fields, param):
    response = thinker.chat("x", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_strict_functions_hold_the_arguments_to_their_schema(thinker):
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    said = '«hm</think>Let me see. <tool_call>\n{"name": "weather", "arguments": {"town": 5}}\n</tool_call>»'
    body = thinker.chat(said, tools=strict, max_tokens=300).json()
    [call] = body["choices"][0]["message"]["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    assert body["choices"][0]["message"]["content"].startswith("Let me see.")


def test_a_budget_closes_the_thinking_and_the_answer_goes_on(switch):
    said = "«" + "long thoughts " * 10 + "</think>\n\nthe answer»"
    body = switch.chat(said, reasoning_max_tokens=20, enable_thinking=True).json()
    message = body["choices"][0]["message"]
    assert message["content"] == "the answer"
    assert message["reasoning"].startswith("long thoughts")
    assert 20 <= body["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 26
    free = switch.chat(said, enable_thinking=True).json()
    assert free["usage"]["completion_tokens_details"]["reasoning_tokens"] > 100


def test_what_the_engine_wrote_behind_the_budget_is_not_taken_for_the_answer(switch, monkeypatch):
    """The engine is a step ahead when it hears that the thinking is over: that step's token is on its way while the answer is begun."""
    engine, late = switch.engine, []

    def cancel(request_id):
        outputs = engine.fake.step()
        late.extend(output for output in outputs if output.request_id == request_id)
        asyncio.get_running_loop().call_soon(engine.tell, Stepped(outputs, engine.fake.load, 0.001))
        engine.fake.cancel(request_id)

    monkeypatch.setattr(engine, "cancel", cancel)
    said = "«" + "long thoughts " * 10 + "</think>\n\nthe answer»"
    message = switch.chat(said, reasoning_max_tokens=20, enable_thinking=True).json()["choices"][0]["message"]
    assert [len(output.tokens) for output in late] == [1]
    assert message["content"] == "the answer"
    assert message["reasoning"] == ("long thoughts " * 2)[:20]


def test_a_shape_is_kept_behind_a_budget_too(switch):
    said = "«" + "long thoughts " * 10 + "</think>\n\nno number»"
    body = switch.chat(said, reasoning_max_tokens=20, guided_regex="[0-9]{4}").json()
    assert body["choices"][0]["message"]["content"].isdigit()
    assert len(body["choices"][0]["message"]["content"]) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": False}, {"metadata": {"enable_thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"options": {"thinking_mode": "close"}}}, {"reasoning_effort": "none"}, {"reasoning_max_tokens": 0},
    ],
)  # fmt: skip
def test_every_way_to_switch_thinking_off(switch, fields):
    message = switch.chat("«plain»", **fields).json()["choices"][0]["message"]
    assert message["content"] == "plain"
    assert "reasoning" not in message


def test_ways_that_disagree_are_a_400(switch):
    response = switch.chat("x", enable_thinking=True, reasoning_effort="none")
    assert response.status_code == 400
    assert "disagree" in response.json()["error"]["message"]


def test_a_model_that_always_thinks_cannot_be_told_not_to(thinker):
    for field, value in (("enable_thinking", False), ("reasoning_effort", "none"), ("reasoning_max_tokens", 0)):
        refused = thinker.chat("x", **{field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert thinker.chat("x", reasoning_effort="low", max_tokens=2).status_code == 200
