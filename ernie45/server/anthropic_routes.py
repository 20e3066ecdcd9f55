"""Anthropic's routes over the same answers: messages, whole and streamed, and counting tokens."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ernie45.server.anthropic_types import REFUSED, CountRequest, MessagesRequest, as_chat, without_refused
from ernie45.server.body import read_json
from ernie45.server.failures import Failure
from ernie45.server.openai_routes import finished, stream_response, tell
from ernie45.server.openapi import body_of
from ernie45.server.prepare import CHAT_FIELDS, chat_jobs, chat_prompt
from ernie45.server.protocol import check_counts, read_fields
from ernie45.server.reply import new_id
from ernie45.server.service import Service
from ernie45.server.stream import event, unless_gone
from ernie45.server.ticket import Ticket
from ernie45.tokens.parse import Delta

_ENDS = {"length": "max_tokens", "stop": "end_turn"}


def add_anthropic(app: FastAPI, service: Service) -> None:
    """POST /v1/messages and /v1/messages/count_tokens."""
    limits = service.settings.limits

    @app.post("/v1/messages", tags=["Anthropic"], openapi_extra=body_of(MessagesRequest))
    async def messages(request: Request) -> Response:
        """Answers a conversation in Anthropic's form."""
        body = await read_json(request, service.body_limits)
        asked = read_fields(MessagesRequest, without_refused(body), REFUSED)
        chat = as_chat(asked, body)
        check_counts(chat, limits)
        model, context = await service.context(asked.model, request.state.caller)
        jobs = await service.prepare_chat(chat_jobs, chat, context, [model.number()], service.now(), fields=CHAT_FIELDS)
        head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": asked.model or model.name}
        request.state.told.update(user=chat.user)
        tickets = service.admit(model, jobs, head["id"])

        def end() -> None:
            tell(request, model, tickets)
            service.release(model, tickets, head["id"])

        if asked.stream:

            def on_failure(failure: Failure) -> bytes:
                return event(failure.anthropic(request.state.request_id), "error")

            return stream_response(service, request, _events(head, tickets[0]), on_failure, end)
        try:
            await unless_gone(request, finished(tickets))
            return JSONResponse(_whole(head, tickets[0]))
        finally:
            end()

    @app.post("/v1/messages/count_tokens", tags=["Anthropic"], openapi_extra=body_of(CountRequest))
    async def count(request: Request) -> JSONResponse:
        """The tokens of the prompt that a conversation makes."""
        body = await read_json(request, service.body_limits)
        asked = read_fields(CountRequest, without_refused(body), REFUSED)
        _, context = await service.context(asked.model, request.state.caller)
        prompted = await service.prepare_chat(chat_prompt, as_chat(asked, body), context, fields=CHAT_FIELDS)
        return JSONResponse({"input_tokens": len(prompted.ids)})


def _usage(ticket: Ticket) -> dict[str, int]:
    cached = ticket.answer.cached_tokens
    return {
        "input_tokens": ticket.answer.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": len(ticket.answer.ids),
    }


def _end(ticket: Ticket) -> dict[str, Any]:
    stopped = ticket.answer.stop_string
    reason = (
        "tool_use"
        if ticket.answer.calls_done
        else "stop_sequence"
        if stopped is not None
        else _ENDS.get(str(ticket.answer.finish), "end_turn")
    )
    return {"stop_reason": reason, "stop_sequence": stopped if reason == "stop_sequence" else None}


def _whole(head: dict[str, Any], ticket: Ticket) -> dict[str, Any]:
    done = ticket.answer.completion()
    blocks: list[dict[str, Any]] = []
    if done.reasoning is not None:
        blocks.append({"type": "thinking", "thinking": done.reasoning, "signature": ""})
    if done.text or not done.tool_calls:
        blocks.append({"type": "text", "text": done.text})
    for call in done.tool_calls:
        blocks.append({"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": _object(call.arguments)})
    return head | {"content": blocks, **_end(ticket), "usage": _usage(ticket)}


def _object(arguments: str) -> dict[str, Any]:
    """Arguments as an object. A model that wrote no JSON gets them back as text, so that the client can say so."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"invalid_json": arguments}


async def _events(head: dict[str, Any], ticket: Ticket) -> AsyncIterator[bytes]:
    """Anthropic's events: a start, blocks that open, grow and close, an end. Raises `Failure`."""
    await ticket.begun()
    usage = _usage(ticket) | {"output_tokens": 0}
    start = head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    yield event({"type": "message_start", "message": start}, "message_start")
    index, open_key = -1, None
    while (piece := await ticket.next()) is not None:
        for delta in piece.deltas:
            key = (delta.kind, delta.index)
            if key != open_key:
                if open_key is not None:
                    yield event({"type": "content_block_stop", "index": index}, "content_block_stop")
                index, open_key = index + 1, key
                yield event({"type": "content_block_start", "index": index, "content_block": _opened(delta)}, "content_block_start")
            if delta.text or delta.arguments:
                yield event({"type": "content_block_delta", "index": index, "delta": _grown(delta)}, "content_block_delta")
    if open_key is None:
        index = 0
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        yield event(block, "content_block_start")
    yield event({"type": "content_block_stop", "index": index}, "content_block_stop")
    yield event({"type": "message_delta", "delta": _end(ticket), "usage": _usage(ticket)}, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")


def _opened(delta: Delta) -> dict[str, Any]:
    if delta.kind == "tool_call":
        return {"type": "tool_use", "id": new_id("toolu_"), "name": delta.name, "input": {}}
    return {"type": "thinking", "thinking": "", "signature": ""} if delta.kind == "reasoning" else {"type": "text", "text": ""}


def _grown(delta: Delta) -> dict[str, Any]:
    if delta.kind == "tool_call":
        return {"type": "input_json_delta", "partial_json": delta.arguments}
    return {"type": "thinking_delta", "thinking": delta.text} if delta.kind == "reasoning" else {"type": "text_delta", "text": delta.text}
