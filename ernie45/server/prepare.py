"""From a checked request to jobs for the engine: conversation -> ids, settings -> sampling, shapes -> grammars. Runs in a worker thread."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ernie45.engine.answer import Answer
from ernie45.engine.request import PlacedPicture, Request, SamplingParams
from ernie45.engine.wire import EngineInfo
from ernie45.errors import RequestError
from ernie45.server.access import BEHIND, Caller
from ernie45.server.failures import bad
from ernie45.server.model import TextSide
from ernie45.server.protocol import ChatRequest, CompletionRequest, Sampling
from ernie45.server.seeing import PARTS, has_pictures, refuse_pictures
from ernie45.server.settings import Limits
from ernie45.server.structured import Shape, Tags, call_shape, checked, forced_tools, framed, shape_of, tool_schemas
from ernie45.server.ticket import Job
from ernie45.tokens.parse import ReplyFormat

EFFORTS: Mapping[str, bool | int] = {"none": False, "minimal": 256, "low": 1024, "medium": 4096, "high": True, "xhigh": True}
"""What reasoning_effort means: off, a budget of tokens, or as much as the model likes."""

CHAT_FIELDS = {"prompt": "messages", "thinking": "enable_thinking", "logprobs": "top_logprobs", "grammar": "response_format"}
"""What the chat protocol calls settings of the floors below."""

_EMPTY_ONLY = ("refusal", "annotations", "audio", "function_call")
_MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content", *_EMPTY_ONLY}


@dataclass(frozen=True, kw_only=True)
class Context:
    """What preparing needs to know of the model, the server and the caller."""

    info: EngineInfo
    text: TextSide
    limits: Limits
    caller: Caller
    adapter: str = ""
    fetched: Mapping[str, bytes] = field(default_factory=dict)
    """What stood behind the addresses of other machines that the conversation names."""


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A prompt, how its answer is read, and what the answer must follow."""

    ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    reply_format: ReplyFormat | None = None
    starts_in: str = "content"
    budget: int | None = None
    grammar: str = ""
    after: str | None = None
    one_call: bool = False
    pictures: tuple[PlacedPicture, ...] = ()
    prediction: tuple[int, ...] = ()


def chat_prompt(request: ChatRequest, context: Context) -> Prompted:
    """The prompt of a conversation. Raises `Failure`, `RequestError` or `TokenizerError`."""
    template, limits = context.text.template, context.limits
    if template is None:
        raise RequestError(f"this model holds no conversations: {context.text.without_template}", "messages")
    if len(request.messages) > limits.messages:
        raise bad(f"messages has {len(request.messages)} entries; at most {limits.messages}", "messages")
    if len(request.tools or []) > limits.tool_definitions:
        raise bad(f"tools has {len(request.tools or [])} entries; at most {limits.tool_definitions}", "tools")
    seeing = context.text.seeing
    messages = [conversation_message(message, n, seeing is not None) for n, message in enumerate(request.messages)]
    pictures: tuple[PlacedPicture, ...] = ()
    thinking = thinking_of(request)
    forced = forced_tools(request)
    tools = tool_schemas(request.tools or []) if request.tool_choice != "none" else []
    if request.prompt_token_ids is not None:
        ids, starts_in = tuple(request.prompt_token_ids), "content"
    elif seeing is not None and has_pictures(messages):
        if request.continue_final_message:
            raise bad("continue_final_message goes on with conversations of text only, and this one has pictures", "continue_final_message")
        measured, seen = seeing.look(messages, context.fetched)
        prompt = template.render(measured, tools=tools or None, thinking=thinking)
        ids, starts_in = prompt.ids, prompt.starts_in
        pictures = tuple(PlacedPicture(span.start, picture) for span, picture in zip(prompt.media, seen, strict=True))
    elif request.continue_final_message:
        ids, starts_in = _continued(messages, context, tools, thinking), "content"
    else:
        prompt = template.render(messages, tools=tools or None, thinking=thinking)
        ids, starts_in = prompt.ids, prompt.starts_in
    shape = _chat_shape(request, context, bool(forced))
    prompted = Prompted(
        ids=ids,
        end_ids=template.stop_ids,
        reply_format=template.reply_format,
        starts_in=starts_in,
        budget=thinking if isinstance(thinking, int) and not isinstance(thinking, bool) and thinking > 0 else None,
        pictures=pictures,
        one_call=request.parallel_tool_calls is False,
        prediction=_prediction(request, context),
    )
    if shape is None:
        return prompted
    tags = Tags(context.text.tokenizer)
    response = "response" in template.reply_format.blocks and shape.field != "tools"
    after = framed(shape, tags, thinking=False, response=response)
    grammar = framed(shape, tags, thinking=True, response=response) if starts_in == "reasoning" else after
    return replace(prompted, grammar=grammar, after=after)


def remote_pictures(request: ChatRequest, context: Context) -> dict[str, str]:
    """Addresses of other machines that a conversation's pictures have, each with its part. Raises as `chat_prompt`."""
    if context.text.seeing is None or request.prompt_token_ids is not None:
        return {}
    messages = [conversation_message(message, n, True) for n, message in enumerate(request.messages)]
    return context.text.seeing.remote(messages) if has_pictures(messages) else {}


def _prediction(request: ChatRequest, context: Context) -> tuple[int, ...]:
    """The ids of what the answer is said to hold. Raises `Failure` 400 where nothing would be made of it."""
    if request.prediction is None:
        return ()
    if context.info.speculative != "ngram":
        raise bad("prediction has no use here: this server was not started with --engine.speculative ngram", "prediction")
    return tuple(context.text.tokenizer.encode(request.prediction.text, start=False))[: context.info.limits.max_length]


def _chat_shape(request: ChatRequest, context: Context, forced: bool) -> Shape | None:
    """The shape an answer must have: of its text, or of the calls in it. Raises `Failure` 400."""
    shape = shape_of(request, context.limits)
    template = context.text.template
    assert template is not None
    functions = forced_tools(request) if forced else [tool.function for tool in request.tools or []]
    strict = request.tool_choice != "none" and any(function.strict for function in functions)
    if not forced and not strict:
        return shape
    if shape is not None:
        raise bad(f"{shape.field} asks for a shape of the answer, and the tools for another; give one", shape.field)
    if "call" not in template.reply_format.blocks:
        raise bad("this model's chat format has no tool calls", "tools")
    shape = call_shape(functions, Tags(context.text.tokenizer), several=request.parallel_tool_calls is not False, free=not forced)
    return checked(shape, context.limits)


def conversation_message(message: Mapping[str, Any], number: int, sees: bool = False) -> dict[str, Any]:
    """A message of the protocol as templates read it; `sees`: it may hold pictures. Raises `Failure` 400 naming the message."""
    where = f"messages[{number}]"
    kept = {}
    for name, value in message.items():
        if name not in _MESSAGE_FIELDS:
            raise bad(f"{where}: '{name[:80]}' is not a field of a message", f"{where}.{name[:80]}")
        if name in _EMPTY_ONLY and value:
            raise bad(f"{where}: {name} is not supported", f"{where}.{name}")
        if value is not None and name not in _EMPTY_ONLY:
            kept[name] = value
    if kept.get("role") == "developer":
        kept["role"] = "system"
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = [_part(part, f"{where}.content[{n}]", sees) for n, part in enumerate(content)]
    return kept


def _part(part: Any, where: str, sees: bool) -> Any:
    if isinstance(part, dict) and part.get("type") not in ("text", "refusal", *(PARTS if sees else ())):
        raise refuse_pictures(part.get("type"), where)
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def fields_of(request: ChatRequest) -> dict[str, str]:
    """`CHAT_FIELDS` of a request: what it says of thinking has many names, and an error has its own."""
    return CHAT_FIELDS | {"thinking": next(iter(_said_of_thinking(request)), "enable_thinking")}


def thinking_of(request: ChatRequest) -> bool | int | None:
    """The one answer of all fields that speak about thinking. Raises `Failure` 400 when they disagree."""
    meant = _said_of_thinking(request)
    if len({bool(value) for value in meant.values()}) > 1:
        raise bad(f"{', '.join(meant)} disagree about thinking", next(iter(meant)))
    budget = meant.get("reasoning_max_tokens", meant.get("reasoning_effort"))
    return budget if budget is not None else next(iter(meant.values()), None)


def _said_of_thinking(request: ChatRequest) -> dict[str, bool | int]:
    """What each field that was set says about thinking."""
    kwargs = request.chat_template_kwargs
    said: dict[str, bool | int | None] = {
        "enable_thinking": request.enable_thinking,
        "metadata.enable_thinking": request.metadata.enable_thinking if request.metadata else None,
    }
    if kwargs is not None:
        modes = {None: None, "open": True, "close": False}
        said["chat_template_kwargs.enable_thinking"] = kwargs.enable_thinking
        said["chat_template_kwargs.thinking"] = kwargs.thinking
        said["chat_template_kwargs.thinking_mode"] = modes[kwargs.thinking_mode]
        said["chat_template_kwargs.options"] = modes[kwargs.options.thinking_mode if kwargs.options else None]
    if request.reasoning_effort is not None:
        said["reasoning_effort"] = EFFORTS[request.reasoning_effort]
    if request.reasoning_max_tokens is not None:
        said["reasoning_max_tokens"] = request.reasoning_max_tokens
    return {name: value for name, value in said.items() if value is not None}


def _continued(
    messages: Sequence[dict[str, Any]], context: Context, tools: Sequence[Mapping[str, Any]], thinking: bool | int | None
) -> tuple[int, ...]:
    """A prompt that ends inside the last message, an answer's beginning."""
    template = context.text.template
    assert template is not None
    last, content = messages[-1], messages[-1].get("content")
    if last.get("role") != "assistant" or not isinstance(content, str) or not content:
        raise bad("continue_final_message needs a last message of the assistant whose content is a text", "continue_final_message")
    if len(messages) < 2:
        raise bad("continue_final_message needs a message before the one to go on with", "messages")
    prompt = template.render(messages[:-1], tools=tools or None, thinking=thinking)
    if prompt.starts_in != "content":
        raise bad(
            "continue_final_message cannot go on with an answer while the model thinks; switch thinking off", "continue_final_message"
        )
    return prompt.ids + tuple(context.text.tokenizer.encode(content, start=False))


# ---- sampling


def sampling_of(request: Sampling, context: Context, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """The request's settings over what the model's folder recommends. Raises `RequestError` naming the field."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    chosen = dict(context.text.sampling)
    chosen |= {name: value for name in names if (value := getattr(request, name)) is not None}
    if chosen.get("top_k") == -1:  # vLLM's word for off
        chosen["top_k"] = 0
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        seed=request.seed,
        stop=tuple(stops),
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        bad_words=_bad_words(request, context),
        logit_bias=_bias(request.logit_bias or {}),
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        **chosen,
    )


def _bad_words(request: Sampling, context: Context) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written at the beginning of a text and behind a space."""
    encode = context.text.tokenizer.encode
    words = [tuple(ids) for ids in request.bad_words_token_ids]
    for word in request.bad_words:
        if not word.strip():
            raise RequestError("bad_words holds a text that is empty", "bad_words")
        words += [tuple(encode(word, start=False)), tuple(encode(" " + word.lstrip(), start=False))]
    return tuple(dict.fromkeys(words))


def _bias(asked: Mapping[str, float]) -> dict[int, float]:
    for id in asked:
        if not (id.isascii() and id.isdecimal() and len(id) < 10):
            raise RequestError(f"logit_bias maps token ids, whole numbers written as texts; '{id[:40]}' is none", "logit_bias")
    return {int(id): value for id, value in asked.items()}


# ---- jobs


def chat_jobs(request: ChatRequest, context: Context, ids: Sequence[str], now: float) -> list[Job]:
    """One job for each of the engine's `ids`, as many as `n`."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise bad("max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
    wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    params = sampling_of(request, context, max_tokens=wanted, logprobs=(request.top_logprobs or 0) if request.logprobs else None)
    prompted = chat_prompt(request, context)
    if request.tool_choice == "none" and request.tools:
        call = context.text.tokenizer.id_of("<tool_call>")
        if call is not None and Tags(context.text.tokenizer).single("<tool_call>"):
            params = replace(params, bad_words=(*params.bad_words, (call,)))
    field = "tools" if request.tools and not (request.response_format or request.structured_outputs) else "response_format"
    return jobs(prompted, params, request, context, ids, now, field)


def completion_jobs(request: CompletionRequest, context: Context, number: Any, now: float) -> list[Job]:
    """n jobs for each prompt, in order. number: makes an id."""
    prompts = prompts_of(request.prompt, context, "prompt")
    params = sampling_of(request, context, max_tokens=16 if request.max_tokens is None else request.max_tokens, logprobs=request.logprobs)
    if request.echo and request.logprobs is not None and params.prompt_logprobs is None:
        params = replace(params, prompt_logprobs=request.logprobs)
    if len(prompts) * request.n > context.limits.prompts:
        raise bad(
            f"{len(prompts)} prompts with n {request.n} make {len(prompts) * request.n} answers; at most {context.limits.prompts}", "n"
        )
    shape = shape_of(request, context.limits)
    grammar = framed(shape, Tags(context.text.tokenizer), thinking=False, response=False) if shape is not None else ""
    made: list[Job] = []
    for ids in prompts:
        prompted = Prompted(ids=ids, end_ids=context.text.tokenizer.eos_ids or context.info.eos_ids, grammar=grammar)
        made += jobs(prompted, params, request, context, [number() for _ in range(request.n)], now, shape.field if shape else "grammar")
    return made


def jobs(
    prompted: Prompted, params: SamplingParams, request: Sampling, context: Context, ids: Sequence[str], now: float, field: str
) -> list[Job]:
    """Jobs that differ in their id and, with a seed, in the seed. Raises as the engine would refuse them."""
    made = []
    for n, id in enumerate(ids):
        asked = Request(
            id=id,
            prompt=prompted.ids,
            params=params if params.seed is None or n == 0 else replace(params, seed=(params.seed + n) % 2**63),
            eos_ids=prompted.end_ids,
            priority=request.priority + (BEHIND if context.caller.background else 0),
            arrival=now,
            cache_salt="\0".join(part for part in (context.caller.salt, request.cache_salt) if part),
            adapter=context.adapter,
            grammar=prompted.grammar,
            pictures=prompted.pictures,
            prediction=prompted.prediction,
        )
        asked.check_vocabulary(context.info.vocab_size)
        most = context.info.limits.check_fits(asked)
        if n == 0 and prompted.grammar:
            context.text.grammars.check(prompted.grammar, field, sorted(asked.end_ids))
        answer = Answer(
            asked,
            most,
            now,
            tokenizer=context.text.tokenizer,
            reply_format=prompted.reply_format,
            starts_in=prompted.starts_in,
            budget=prompted.budget,
        )
        made.append(Job(request=asked, answer=answer, caller=context.caller, after=prompted.after, one_call=prompted.one_call))
    return made


def prompts_of(given: str | list[Any], context: Context, field: str) -> list[tuple[int, ...]]:
    """One or several prompts, as texts or ids. Raises `Failure` 400."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise bad(f"{field} is empty", field)
    if len(given) > context.limits.prompts:
        raise bad(f"{field} has {len(given)} entries; at most {context.limits.prompts}", field)
    found = [tuple(context.text.tokenizer.encode(item)) if isinstance(item, str) else tuple(item) for item in given]
    if not all(found):
        raise bad(f"{field} holds an empty prompt", field)
    return found
