"""Answers of a given shape, and that hostile shapes are refused quickly."""

import json
import time

import pytest

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
TAG = {"type": "structural_tag", "triggers": ["<fn="], "structures": [{"begin": "<fn=person>", "schema": PERSON, "end": "</fn>"}]}


@pytest.fixture
def running(shared):
    """One server for the whole file: these tests send requests and leave nothing behind."""
    return shared


def said(running, text, **fields):
    body = running.chat(f"«{text}»", max_tokens=200, **fields)
    assert body.status_code == 200, body.text
    return body.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fields", [{"response_format": SCHEMA}, {"guided_json": PERSON}, {"structured_outputs": {"json": PERSON}}])
def test_a_schema_is_followed_whatever_the_model_wants(running, fields):
    assert set(json.loads(said(running, "I would rather not", **fields))) == {"name", "age"}
    assert said(running, '{"name": "Ada", "age": 36}', **fields) == '{"name": "Ada", "age": 36}'


def test_any_json_object(running):
    assert isinstance(json.loads(said(running, "no", response_format={"type": "json_object"})), dict)
    assert said(running, '{"a": [1, {"b": null}]}', response_format={"type": "json_object"}) == '{"a": [1, {"b": null}]}'


@pytest.mark.parametrize("fields", [{"guided_choice": ["yes", 'n"o']}, {"response_format": {"type": "choice", "choice": ["yes", 'n"o']}}])
def test_a_choice(running, fields):
    assert said(running, "yes", **fields) == "yes"
    assert said(running, 'n"o', **fields) == 'n"o'
    assert said(running, "maybe", **fields) in ("yes", 'n"o')


def test_a_regular_expression(running):
    assert said(running, "a/b 12", guided_regex="a/b [0-9]{2}") == "a/b 12"
    assert len(said(running, "zzz", guided_regex="[0-9]{5}")) == 5


def test_a_lark_grammar(running):
    grammar = 'start: "x" y\ny: /[0-9]+/ "."'
    assert said(running, "x42.", guided_grammar=grammar) == "x42."
    assert said(running, "hello", response_format={"type": "grammar", "grammar": grammar}).startswith("x")


def test_structural_tags_hold_only_within_the_tags(running):
    text = said(running, 'See <fn=person>{"nome": 5}</fn> there', response_format=TAG)
    begin, end = text.index("<fn=person>") + 11, text.rindex("</fn>")
    assert set(json.loads(text[begin:end])) == {"name", "age"}
    assert text.startswith("See ")
    assert said(running, "free text < with = signs", response_format=TAG) == "free text < with = signs"


def test_completions_take_shapes_too(running):
    body = running.post("/v1/completions", {"prompt": "«nothing»", "guided_regex": "[ab]{3}", "max_tokens": 10}).json()
    assert body["choices"][0]["text"] in {a + b + c for a in "ab" for b in "ab" for c in "ab"}


def test_a_complete_answer_ends_before_min_tokens(running):
    assert said(running, "yes", guided_choice=["yes"], min_tokens=50) == "yes"


NESTED: dict = {"type": "object"}
for _ in range(60):
    NESTED = {"type": "object", "properties": {"a": NESTED}, "required": ["a"]}

HOSTILE = {
    "no such type": {"guided_json": {"type": "wizard"}},
    "a reference elsewhere": {"guided_json": {"$ref": "http://127.0.0.1/schema.json"}},
    "a reference to nowhere": {"guided_json": {"$ref": "#/$defs/none"}},
    "an open bracket": {"guided_regex": "((((((("},
    "a grammar that calls nothing": {"guided_grammar": "start: nope"},
    "a grammar of another": {"guided_grammar": "start: @frame"},
    "no grammar at all": {"guided_grammar": "%%%"},
    "a pattern too large to begin": {"guided_regex": "(a{1000}){1000}"},
    "a chain of rules": {"guided_grammar": "start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(4000)) + '\nr4000: "x"'},
    "a chain of terminals": {"guided_grammar": "start: T0\n" + "\n".join(f"T{n}: T{n + 1}" for n in range(4000)) + '\nT4000: "x"'},
    "a chain of references": {
        "guided_json": {"$ref": "#/$defs/d0", "$defs": {f"d{n}": {"items": {"$ref": f"#/$defs/d{(n + 1) % 4000}"}} for n in range(4000)}}
    },
    "options without end": {"guided_regex": "a?" * 8000 + "a" * 8000},
    "properties without end": {"guided_json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(8000)}}},
    "brackets in brackets": {"guided_grammar": "start: " + "(" * 20000 + '"x"' + ")" * 20000},
    "an impossible number": {"guided_json": {"type": "integer", "minimum": 5, "maximum": 1}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shapes_are_a_400_and_quick(running, name):
    began = time.monotonic()
    response = running.chat("x", max_tokens=4, **HOSTILE[name])
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert time.monotonic() - began < 10


def test_a_shape_that_grows_too_complex_on_the_way_is_the_callers_mistake(running):
    response = running.chat("«bbaaa»", max_tokens=9, guided_regex="b*(a{1000}){1000}")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "grammar_failed"
    assert running.chat("«fine»").json()["choices"][0]["message"]["content"] == "fine"


def test_large_shapes_are_served_or_refused_and_the_server_lives(running):
    enum = {"enum": [f"word {n}" for n in range(3000)]}
    many = {"type": "object", "properties": {f"p{n}": {"type": "string", "maxLength": 64} for n in range(150)}}
    for schema in (NESTED, enum, many, {"type": "string", "maxLength": 2000}):
        assert running.chat("x", max_tokens=2, guided_json=schema).status_code in (200, 400)
    assert running.chat("x", max_tokens=2, guided_regex="((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}").status_code in (200, 400)
    assert running.chat("«fine»").json()["choices"][0]["message"]["content"] == "fine"


def test_schemas_of_tools_are_measured_too(serve):
    parameters = {"properties": {f"p{n}": {"type": "string"} for n in range(60)}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    response = serve(limits={"schema_bytes": 500}).chat("x", tools=[tool], tool_choice="required")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"


def test_ignoring_the_end_of_a_shape_is_refused(running):
    response = running.chat("x", guided_choice=["a"], ignore_eos=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "ignore_eos"
