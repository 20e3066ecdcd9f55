"""OpenAI's routes: chat completions, completions, models; and what vLLM adds: tokenize, detokenize, apply_template, cancel."""

from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ernie45.server.body import read_json
from ernie45.server.failures import Failure
from ernie45.server.model import ServedModel
from ernie45.server.openapi import body_of
from ernie45.server.prepare import chat_jobs, completion_jobs, fields_of
from ernie45.server.protocol import REFUSED, ChatRequest, CompletionRequest, check_counts, read_fields
from ernie45.server.reply import DONE, Writer, new_id, usage
from ernie45.server.resume import HeldStream
from ernie45.server.service import Service
from ernie45.server.stream import EventStream, Outlet, event, unless_gone
from ernie45.server.ticket import Job, Ticket

_LAST_EVENT = {"name": "Last-Event-ID", "in": "header", "required": True, "schema": {"type": "string"}}


def add_openai(app: FastAPI, service: Service) -> None:
    """POST /v1/chat/completions, POST /v1/completions, GET /v1/streams, GET /v1/models, GET /v1/models/{name}."""

    @app.post("/v1/chat/completions", tags=["OpenAI"], openapi_extra=body_of(ChatRequest))
    async def chat(request: Request) -> Response:
        """Answers a conversation, whole or as server-sent events."""
        asked = read_fields(ChatRequest, await read_json(request, service.body_limits), REFUSED["chat"])
        return await chat_answer(service, request, asked)

    @app.post("/v1/completions", tags=["OpenAI"], openapi_extra=body_of(CompletionRequest))
    async def complete(request: Request) -> Response:
        """Continues texts, whole or as server-sent events."""
        asked = read_fields(CompletionRequest, await read_json(request, service.settings.limits), REFUSED["completions"])
        return await completion_answer(service, request, asked)

    @app.get("/v1/streams", tags=["OpenAI"], openapi_extra={"parameters": [_LAST_EVENT]})
    async def take_up(request: Request) -> Response:
        """The rest of a stream whose connection was lost, after the event named by `Last-Event-ID`."""
        held, after = service.streams.find(request.headers.get("last-event-id"), request.state.caller)
        return _held_response(service, held, after)

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> JSONResponse:
        """Every name that requests may use."""
        cards = []
        for model in service.models:
            adapters = model.adapters.names() if model.adapters is not None else []
            cards += [_card(model, name) for name in model.names]
            cards += [_card(model, f"{name}:{adapter}", name) for name in model.names for adapter in adapters]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> JSONResponse:
        """One name."""
        model, adapter = service.find(name)
        return JSONResponse(_card(model, name, name.removesuffix(f":{adapter}") if adapter else None))


def _card(model: ServedModel, name: str, parent: str | None = None) -> dict[str, Any]:
    """What is said of a name. parent: the model's, when the name is an adapter's."""
    card: dict[str, Any] = {"id": name, "object": "model", "created": model.created, "owned_by": "ernie45", "root": model.name}
    card["max_model_len"] = model.info.limits.max_length if model.info else None
    if parent is not None:
        card["parent"] = parent
    if model.text is not None:
        card["defaults"] = dict(model.text.sampling)
    template = model.text.template if model.text else None
    if (
        model.text is not None and template is not None and template.family is not None
    ):  # of a folder's own template nobody knows what it can say
        family = template.family
        card["capabilities"] = {"vision": model.text.seeing is not None, "thinking": family.thinking != "never", "tools": family.tools}
    return card


async def chat_answer(service: Service, request: Request, asked: ChatRequest) -> Response:
    """The response to a checked chat request."""
    check_counts(asked, service.settings.limits)
    model, context = await service.context(asked.model, request.state.caller)
    numbers = [model.number() for _ in range(asked.n)]
    jobs = await service.prepare_chat(chat_jobs, asked, context, numbers, service.now(), fields=fields_of(asked))
    writer = _writer(service, context.text.tokenizer, asked.model or model.name, asked.request_id or new_id("chatcmpl-"))
    request.state.told.update(user=asked.user or asked.safety_identifier, cache_key=asked.prompt_cache_key)
    if asked.stream:
        return _streamed(service, request, model, jobs, writer, partial(writer.chat_chunks, asked))
    return await _whole(service, request, model, jobs, writer, lambda tickets: writer.chat(asked, tickets))


async def completion_answer(service: Service, request: Request, asked: CompletionRequest) -> Response:
    """The response to a checked completion request."""
    check_counts(asked, service.settings.limits)
    model, context = await service.context(asked.model, request.state.caller)
    jobs = await service.prepare(completion_jobs, asked, context, model.number, service.now())
    writer = _writer(service, context.text.tokenizer, asked.model or model.name, asked.request_id or new_id("cmpl-"))
    request.state.told.update(user=asked.user)
    if asked.stream:
        return _streamed(service, request, model, jobs, writer, partial(writer.completion_chunks, asked))
    return await _whole(service, request, model, jobs, writer, lambda tickets: writer.completion(asked, tickets))


def _writer(service: Service, tokenizer: Any, model: str, id: str) -> Writer:
    return Writer(id=id, model=model, tokenizer=tokenizer, reasoning=service.settings.reasoning_field)


async def _whole(
    service: Service,
    request: Request,
    model: ServedModel,
    jobs: Sequence[Job],
    writer: Writer,
    write: Callable[[list[Ticket]], dict[str, Any]],
) -> Response:
    tickets = service.admit(model, jobs, writer.id)
    try:
        await unless_gone(request, finished(tickets))
        return JSONResponse(write(tickets))
    finally:
        tell(request, model, tickets)
        service.release(model, tickets, writer.id)


def _streamed(
    service: Service,
    request: Request,
    model: ServedModel,
    jobs: Sequence[Job],
    writer: Writer,
    write: Callable[[list[Ticket], Outlet], AsyncIterator[bytes]],
) -> Response:
    tickets, outlet = service.admit(model, jobs, writer.id), Outlet()

    def on_failure(failure: Failure) -> bytes:
        request.state.told.update(code=failure.code)
        return event(failure.openai()) + DONE

    def on_end() -> None:
        tell(request, model, tickets)
        service.release(model, tickets, writer.id)

    return stream_response(service, request, write(tickets, outlet), on_failure, on_end, outlet)


def stream_response(
    service: Service,
    request: Request,
    events: AsyncIterator[bytes],
    on_failure: Callable[[Failure], bytes],
    on_end: Callable[[], None],
    outlet: Outlet | None = None,
) -> Response:
    """Events as a response, with the server's patience; they can be taken up again when the client asked for it.

    outlet: opened for the client, unless what it gets must be kept.
    """
    try:
        held = service.streams.hold(request.headers, request.state.caller, events, on_failure, on_end)
    except Failure:
        on_end()
        raise
    if held is not None:
        return _held_response(service, held, 0)
    return EventStream(events, on_failure=on_failure, on_end=on_end, headers={}, outlet=outlet, **_patience(service))


def _held_response(service: Service, held: HeldStream, after: int) -> Response:
    return EventStream(
        held.follow(after), on_failure=lambda failure: b"", on_end=lambda: None, headers={"x-stream-id": held.id}, **_patience(service)
    )


def _patience(service: Service) -> dict[str, Any]:
    return {"keep_alive": service.settings.keep_alive_seconds, "write_seconds": service.settings.limits.write_seconds}


async def finished(tickets: Sequence[Ticket]) -> None:
    """Until all answers are over. Raises the first `Failure`."""
    for ticket in tickets:
        await ticket.wait()


def tell(request: Request, model: ServedModel, tickets: Sequence[Ticket]) -> None:
    """What the log line says of an answer: sizes and times, no text."""
    counted = usage(tickets)
    first = tickets[0]
    request.state.told.update(
        model=model.name,
        prompt_tokens=counted["prompt_tokens"],
        completion_tokens=counted["completion_tokens"],
        cached_tokens=counted["prompt_tokens_details"]["cached_tokens"],
        finish=str(first.answer.finish) if first.answer.finish else "cancelled",
        first_token_ms=None if first.first is None else round((first.first - first.came) * 1000, 1),
    )
