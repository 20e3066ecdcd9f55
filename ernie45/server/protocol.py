"""OpenAI's chat and completion requests as types: every field is honoured, or refused by name.

A field of the protocol that would have no effect here stands in a table of refusals with the reason; values of it that ask for nothing
pass. Everything else that is no field is an error too, with the nearest name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ernie45.errors import did_you_mean
from ernie45.server.failures import Failure, bad
from ernie45.server.settings import Limits

M = TypeVar("M", bound="Fields")


class Fields(BaseModel):
    """A request: what it does not know it refuses, and it converts nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Fields):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class StructuredOutputs(Fields):
    """vLLM's way to ask for a grammar: exactly one of these."""

    json_: Any = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None


class Sampling(Fields):
    """What chat and plain completions share. None leaves a setting to the model's folder, else to OpenAI's default."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    bad_words: list[str] = []
    bad_words_token_ids: list[list[int]] = []
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = Field(None, max_length=256)
    priority: int = Field(0, ge=-100, le=100)
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    user: str | None = Field(None, max_length=256)

    @field_validator("min_tokens", "n", "stop_token_ids", "bad_words", "stream", "priority", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        """OpenAI's clients write null for what they leave open."""
        return cls.model_fields[info.field_name].get_default(call_default_factory=True) if value is None else value


class FunctionTool(Fields):
    """A function a model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool: functions are the only kind here."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Fields):
    """The name of a function."""

    name: str


class NamedTool(Fields):
    """Which function must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Fields):
    """A schema that the answer must follow. strict is what is done in either case."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """What shape the answer must have. regex, choice and grammar are extensions; structural tags as vLLM and SGLang write them."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


class ThinkingOptions(Fields):
    """FastDeploy's options of a template."""

    thinking_mode: Literal["open", "close"] | None = None


class TemplateKwargs(Fields):
    """The settings of a chat template that a client may set."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    thinking_mode: Literal["open", "close"] | None = None
    options: ThinkingOptions | None = None


class Metadata(Fields):
    """FastDeploy's clients switch thinking here. Nothing is stored, so nothing else is taken."""

    enable_thinking: bool | None = None


class PredictedPart(Fields):
    """A piece of a predicted text."""

    type: Literal["text"]
    text: str


class Prediction(Fields):
    """What the answer will hold for the most part, such as a file that is being edited: drafts are made of it."""

    type: Literal["content"]
    content: str | list[PredictedPart]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    reasoning_max_tokens: int | None = Field(None, ge=0)
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    metadata: Metadata | None = None
    continue_final_message: bool = False
    prompt_token_ids: list[int] | None = None
    prompt_cache_key: str | None = Field(None, max_length=256)
    safety_identifier: str | None = Field(None, max_length=256)
    prediction: Prediction | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions. max_tokens is 16 when it is left out, as in OpenAI's reference."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @field_validator("echo", mode="before")
    @classmethod
    def _null_is_false(cls, value: Any) -> Any:
        return False if value is None else value


class EmbeddingRequest(Fields):
    """POST /v1/embeddings."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=256)


REFUSED: Mapping[str, Mapping[str, str]] = {
    "chat": {
        "audio": "this server speaks and hears no audio",
        "chat_template": "a template is a program; only the operator may set one",
        "function_call": "it is deprecated; use tool_choice",
        "functions": "it is deprecated; use tools",
        "modalities": 'this server answers in text only: leave it out, or ["text"]',
        "moderation": "there is no moderation model here",
        "prompt_cache_options": "the prompt cache has no options; cache_salt keeps a prompt's cache apart",
        "prompt_cache_retention": "cached prompts stay in memory until their place is needed: leave it out, or in_memory",
        "service_tier": "there is one tier: leave it out, or auto or default",
        "store": "chat completions are not stored; /v1/responses stores",
        "verbosity": "this model has no switch for verbosity: leave it out, or medium",
        "web_search_options": "this server does not search the web",
    },
    "completions": {
        "best_of": "the answers are not ranked: ask for n",
        "suffix": "this model does not fill in the middle of a text",
        "chat_template": "a plain completion has no template",
    },
    "embeddings": {},
}
"""Fields of the protocols that are refused, and why."""

NEUTRAL: Mapping[str, Sequence[Any]] = {
    "best_of": (1,),
    "modalities": (["text"],),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
}
"""Values of refused fields that ask for nothing beyond what is done."""


def read_fields(kind: type[M], body: Mapping[str, Any], refused: Mapping[str, str]) -> M:
    """A body as a request of this kind. Raises `Failure` 400 naming the field."""
    kept = {}
    for name, value in body.items():
        if name in refused:
            if value is not None and value not in NEUTRAL.get(name, ()):
                raise Failure(400, f"{name} is not supported: {refused[name]}", field=name, code="unsupported_parameter")
        else:
            kept[name] = value
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        raise _explained(error, kind) from None


def _explained(error: ValidationError, kind: type[BaseModel]) -> Failure:
    """The first thing that is wrong, said with the field's path. The longest path of a union's complaints is the closest miss."""
    found = error.errors(include_url=False, include_context=False)
    first = [item for item in found if item["loc"][:1] == found[0]["loc"][:1]]
    item = max(first, key=lambda item: len(item["loc"]))
    path = ".".join(str(part) for part in item["loc"] if not _union_word(part))
    top = str(item["loc"][0]) if item["loc"] else None
    if item["type"] == "extra_forbidden":
        names = [field.alias or name for name, field in kind.model_fields.items()] if len(item["loc"]) == 1 else []
        return Failure(400, f"{path} is not a field of this request{did_you_mean(path, names)}", field=path, code="unknown_parameter")
    if item["type"] == "missing":
        return Failure(400, f"{path} is missing", field=path, code="missing_required_parameter")
    shown = json.dumps(item.get("input"), default=str, ensure_ascii=True)[:80]
    return Failure(400, f"{path}: {_lowered(item['msg'])}; it is {shown}", field=path or top, code="invalid_value")


def _union_word(part: Any) -> bool:
    """Pydantic puts the member of a union that it tried into the path; people did not write it."""
    return isinstance(part, str) and (part.endswith("]") or part in ("str", "int", "float", "bool", "NamedTool"))


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def check_counts(request: Sampling, limits: Limits) -> None:
    """The limits table over what both kinds of request share. Raises `Failure` 400."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    words = len(request.bad_words) + len(request.bad_words_token_ids)
    for name, count, most in (
        ("n", request.n, limits.n),
        ("stop", len(stops), limits.stop),
        ("stop_token_ids", len(request.stop_token_ids), limits.stop_token_ids),
        ("logit_bias", len(request.logit_bias or {}), limits.logit_bias),
        ("bad_words", words, limits.bad_words),
    ):
        if count > most:
            raise bad(
                f"{name} is {count}; this server takes at most {most}" if name == "n" else f"{name} has {count} entries; at most {most}",
                name,
            )
    if request.n < 1:
        raise bad(f"n must be at least 1, not {request.n}", "n")
    for text in stops:
        if not 0 < len(text) <= limits.stop_characters:
            raise bad(f"a stop string has {len(text)} characters; from 1 to {limits.stop_characters} are allowed", "stop")
    if request.stream and request.prompt_logprobs is not None:
        raise bad("prompt_logprobs cannot be streamed: leave stream out", "prompt_logprobs")
    if request.stream and isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        raise bad("logprobs of an echoed prompt cannot be streamed: leave stream out, or echo", "logprobs")
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options is for streams: set stream to true, or leave it out", "stream_options")
