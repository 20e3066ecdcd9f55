"""OpenAI's responses over the same answers: create, stream, fetch, stop, forget."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from ernie45.engine.answer import Completion
from ernie45.server.body import read_json
from ernie45.server.failures import Failure
from ernie45.server.openai_routes import finished, stream_response, tell
from ernie45.server.openapi import body_of
from ernie45.server.prepare import CHAT_FIELDS, chat_jobs
from ernie45.server.protocol import check_counts, read_fields
from ernie45.server.reply import new_id, usage
from ernie45.server.responses_store import Kept, ResponseStore
from ernie45.server.responses_types import REFUSED, ResponsesRequest, as_chat, messages_of, without_neutral
from ernie45.server.service import Service
from ernie45.server.stream import event, unless_gone
from ernie45.server.ticket import State, Ticket
from ernie45.tokens.parse import Delta

_FIELDS = CHAT_FIELDS | {"prompt": "input", "max_tokens": "max_output_tokens", "thinking": "reasoning", "grammar": "text.format"}


def add_responses(app: FastAPI, service: Service) -> None:
    """POST /v1/responses; GET, DELETE /v1/responses/{id}; POST /v1/responses/{id}/cancel."""
    store = ResponseStore()

    @app.post("/v1/responses", tags=["OpenAI"], openapi_extra=body_of(ResponsesRequest))
    async def create(request: Request) -> Response:
        """Answers a conversation as OpenAI's responses, whole or as events; kept unless `store` is false."""
        asked = read_fields(ResponsesRequest, without_neutral(await read_json(request, service.body_limits)), REFUSED)
        caller = request.state.caller
        kept = not caller.background if asked.store is None else asked.store  # a batch would push out what people keep
        earlier = store.find(asked.previous_response_id, caller).messages if asked.previous_response_id else ()
        chat = as_chat(asked, earlier)
        check_counts(chat, service.settings.limits)
        model, context = await service.context(asked.model, caller)
        jobs = await service.prepare_chat(chat_jobs, chat, context, [model.number()], service.now(), fields=_FIELDS)
        writer = ResponseWriter(asked, asked.model or model.name)
        request.state.told.update(user=asked.user or asked.safety_identifier, cache_key=asked.prompt_cache_key)
        tickets = service.admit(model, jobs, writer.id)

        def end() -> None:
            tell(request, model, tickets)
            service.release(model, tickets, writer.id)
            if kept and tickets[0].failure is None and tickets[0].state is State.over:
                messages = (*earlier, *messages_of(asked.input), *writer.as_messages(tickets[0]))
                store.keep(Kept(caller.owner, writer.body(tickets[0]), messages, len(json.dumps(messages))))

        if asked.stream:

            def on_failure(failure: Failure) -> bytes:
                return writer.failed(failure)

            return stream_response(service, request, writer.events(tickets[0]), on_failure, end)
        try:
            await unless_gone(request, finished(tickets))
            return JSONResponse(writer.body(tickets[0]))
        finally:
            end()

    @app.get("/v1/responses/{id}", tags=["OpenAI"])
    async def fetch(request: Request, id: str) -> JSONResponse:
        """A kept response."""
        return JSONResponse(store.find(id, request.state.caller).body)

    @app.delete("/v1/responses/{id}", tags=["OpenAI"])
    async def forget(request: Request, id: str) -> JSONResponse:
        """Forgets a kept response."""
        store.drop(id, request.state.caller)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{id}/cancel", tags=["OpenAI"])
    async def cancel(request: Request, id: str) -> JSONResponse:
        """Stops a response that is being made; of one that is over, says what it is."""
        for ticket in service.live.get(id, []):
            if ticket.job.caller.owner == request.state.caller.owner:
                for model in service.models:
                    if model.has(ticket):
                        model.cancel(ticket)
                return JSONResponse({"id": id, "object": "response", "status": "cancelled", "output": []})
        return JSONResponse(store.find(id, request.state.caller).body)


@dataclass
class ResponseWriter:
    """How one response is written, whole and as events."""

    asked: ResponsesRequest
    model: str
    id: str = field(default_factory=lambda: new_id("resp_"))
    created: int = field(default_factory=lambda: int(time.time()))
    _number: int = 0
    _ids: dict[tuple[str, int], str] = field(default_factory=dict)

    def body(self, ticket: Ticket) -> dict[str, Any]:
        """The whole response."""
        done = ticket.answer.completion()
        status = {"length": "incomplete", "stop": "completed"}.get(str(ticket.answer.finish), "cancelled")
        counted = usage([ticket])
        return self._head(status, self._output(done, status)) | {
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": counted["prompt_tokens_details"]["cached_tokens"], "cache_write_tokens": 0},
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": counted["completion_tokens_details"]["reasoning_tokens"]},
                "total_tokens": counted["total_tokens"],
            },
        }

    def as_messages(self, ticket: Ticket) -> list[dict[str, Any]]:
        """The answer as the conversation goes on with it."""
        done = ticket.answer.completion()
        message: dict[str, Any] = {"role": "assistant", "content": done.text}
        if done.tool_calls:
            message["tool_calls"] = [
                {
                    "id": self._item("tool_call", n, "call_"),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for n, call in enumerate(done.tool_calls)
            ]
        return [message]

    def _head(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        asked = self.asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": asked.reasoning.model_dump() if asked.reasoning else None,
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [{"parameters": None, "strict": None} | tool.model_dump() for tool in asked.tools or []],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
        }

    def _output(self, done: Completion, status: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        if done.reasoning is not None:
            items.append(self._reasoning(done.reasoning))
        if done.text or not done.tool_calls:
            items.append(self._message(done.text, "incomplete" if status != "completed" else status))
        items += [self._call(n, call.name, call.arguments, "completed") for n, call in enumerate(done.tool_calls)]
        return items

    def _item(self, kind: str, index: int, prefix: str) -> str:
        """The id of an item, the same in events and in the whole."""
        return self._ids.setdefault((prefix + kind, index), new_id(prefix))

    def _reasoning(self, text: str) -> dict[str, Any]:
        content = [{"type": "reasoning_text", "text": text}] if text else []
        return {"type": "reasoning", "id": self._item("reasoning", 0, "rs_"), "summary": [], "content": content}

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"type": "message", "id": self._item("content", 0, "msg_"), "role": "assistant", "status": status, "content": content}

    def _call(self, index: int, name: str, arguments: str, status: str) -> dict[str, Any]:
        ids = {"id": self._item("tool_call", index, "fc_"), "call_id": self._item("tool_call", index, "call_")}
        return {"type": "function_call", **ids, "name": name, "arguments": arguments, "status": status}

    # ---- events

    def _event(self, kind: str, data: Mapping[str, Any]) -> bytes:
        made = event({"type": kind, "sequence_number": self._number, **data}, kind)
        self._number += 1
        return made

    def failed(self, failure: Failure) -> bytes:
        """The last event of a response that broke."""
        error = {"code": "server_error", "message": str(failure)}
        return self._event("response.failed", {"response": self._head("failed", []) | {"error": error}})

    async def events(self, ticket: Ticket) -> AsyncIterator[bytes]:
        """A start, items that open, grow and close, an end. Raises `Failure`."""
        await ticket.begun()
        head = self._head("in_progress", [])
        yield self._event("response.created", {"response": head})
        yield self._event("response.in_progress", {"response": head})
        opened: _Open | None = None
        count = 0
        while (piece := await ticket.next()) is not None:
            for delta in piece.deltas:
                if opened is None or (opened.kind, opened.index) != (delta.kind, delta.index):
                    for made in self._closed(opened):
                        yield made
                    opened = _Open(delta.kind, delta.index, count, delta.name)
                    count += 1
                    for made in self._opened(opened):
                        yield made
                if delta.text or delta.arguments:
                    yield self._grown(opened, delta)
        for made in self._closed(opened):
            yield made
        body = self.body(ticket)
        yield self._event("response.incomplete" if body["status"] == "incomplete" else "response.completed", {"response": body})

    def _opened(self, item: "_Open") -> list[bytes]:
        if item.kind == "tool_call":
            value = self._call(item.index, item.name, "", "in_progress")
        else:
            value = self._reasoning("") if item.kind == "reasoning" else self._message(None, "in_progress")
        made = [self._event("response.output_item.added", {"output_index": item.place, "item": value})]
        if item.kind == "content":
            where = {"item_id": value["id"], "output_index": item.place, "content_index": 0}
            made.append(self._event("response.content_part.added", where | {"part": _part("")}))
        return made

    def _grown(self, item: "_Open", delta: Delta) -> bytes:
        text = delta.arguments if item.kind == "tool_call" else delta.text
        item.text += text
        name, where = self._place(item)
        extra = {"logprobs": []} if item.kind == "content" else {}
        return self._event(f"response.{name}.delta", where | {"delta": text} | extra)

    def _place(self, item: "_Open") -> tuple[str, dict[str, Any]]:
        if item.kind == "tool_call":
            return "function_call_arguments", {"item_id": self._item("tool_call", item.index, "fc_"), "output_index": item.place}
        name, id = (
            ("reasoning_text", self._item("reasoning", 0, "rs_"))
            if item.kind == "reasoning"
            else ("output_text", self._item("content", 0, "msg_"))
        )
        return name, {"item_id": id, "output_index": item.place, "content_index": 0}

    def _closed(self, item: "_Open | None") -> list[bytes]:
        if item is None:
            return []
        name, where = self._place(item)
        if item.kind == "tool_call":
            value = self._call(item.index, item.name, item.text, "completed")
            made = [self._event(f"response.{name}.done", where | {"arguments": item.text, "name": item.name})]
        elif item.kind == "reasoning":
            value = self._reasoning(item.text)
            made = [self._event(f"response.{name}.done", where | {"text": item.text})]
        else:
            value = self._message(item.text, "completed")
            made = [self._event(f"response.{name}.done", where | {"text": item.text, "logprobs": []})]
            made.append(self._event("response.content_part.done", where | {"part": _part(item.text)}))
        return [*made, self._event("response.output_item.done", {"output_index": item.place, "item": value})]


@dataclass
class _Open:
    """An item that is being written: the delta's kind and index, its place in the output."""

    kind: str
    index: int
    place: int
    name: str
    text: str = ""


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
