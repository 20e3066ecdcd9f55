"""Answers in the shape of OpenAI's chat and completion objects, whole and in chunks."""

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ernie45.engine.output import TokenLogprobs
from ernie45.server.merge import Merged, as_events
from ernie45.server.protocol import ChatRequest, CompletionRequest
from ernie45.server.stream import Mould, Outlet, event
from ernie45.server.ticket import Piece, Ticket
from ernie45.tokens.parse import Delta
from ernie45.tokens.tokenizer import Tokenizer

DONE = event("[DONE]")
ReasoningField = Literal["reasoning_content", "reasoning", "both"]


def new_id(prefix: str) -> str:
    """An id nobody can guess."""
    return f"{prefix}{secrets.token_hex(12)}"


@dataclass(kw_only=True)
class Writer:
    """What all objects of one request share, and how they are written."""

    id: str
    model: str
    tokenizer: Tokenizer
    reasoning: ReasoningField
    created: int = field(default_factory=lambda: int(time.time()))

    # ---- chat

    def chat(self, request: ChatRequest, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """A whole `chat.completion`."""
        choices = []
        for index, ticket in enumerate(tickets):
            done = ticket.answer.completion()
            message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
            if done.reasoning is not None:
                message |= self._reasoned(done.reasoning)
            if done.tool_calls:
                message["tool_calls"] = [
                    {"id": new_id("call_"), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for call in done.tool_calls
                ]
                message["content"] = done.text or None
            choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": finish_word(ticket), "logprobs": None}
            if request.logprobs:
                choice["logprobs"] = {"content": self.chat_logprobs(ticket.answer.logprobs), "refusal": None}
            if request.return_token_ids:
                choice["token_ids"] = list(ticket.answer.ids)
            choices.append(choice)
        whole = self._head("chat.completion") | {"choices": choices, "usage": usage(tickets)}
        return whole | self._prompt_extras(request.return_token_ids, tickets, request.prompt_logprobs is not None)

    async def chat_chunks(self, request: ChatRequest, tickets: Sequence[Ticket], outlet: Outlet) -> AsyncIterator[bytes]:
        """An event with a `chat.completion.chunk` for each piece. Raises `Failure` when the engine broke."""
        counts = request.stream_options is not None and request.stream_options.continuous_usage_stats
        head = self._head("chat.completion.chunk")
        await tickets[0].begun()
        for index, ticket in enumerate(tickets):
            first = _chunk(index, {"role": "assistant", "content": ""})
            if request.return_token_ids:
                first["prompt_token_ids"] = list(ticket.job.request.prompt)
            yield event(head | {"choices": [first]} | ({"usage": usage(tickets)} if counts else {}))
        async for data in as_events(tickets, self._chat_events(request, tickets, head, counts), outlet):
            yield data
        if request.stream_options is not None and request.stream_options.include_usage:
            yield event(head | {"choices": [], "usage": usage(tickets)})
        yield DONE

    def _chat_events(
        self, request: ChatRequest, tickets: Sequence[Ticket], head: dict[str, Any], counts: bool
    ) -> Callable[[Merged], list[bytes]]:
        """What says a piece in events."""
        bare = not (counts or request.logprobs or request.return_token_ids)  # then nothing but the text differs
        moulds: dict[tuple[int, str], Mould] = {}
        names: dict[tuple[int, int], str] = {}

        def write(item: Merged) -> list[bytes]:
            if not bare or item.piece is None:
                choices = self._chat_choices(request, item, names)
                return [event(head | {"choices": [choice]} | ({"usage": usage(tickets)} if counts else {})) for choice in choices]
            events = []
            for delta in item.piece.deltas:
                if delta.text:
                    mould = moulds.get((item.index, delta.kind)) or self._mould(moulds, head, item.index, delta.kind)
                    events.append(mould.fill(delta.text))
                elif delta.name or delta.arguments:
                    events.append(event(head | {"choices": [_chunk(item.index, self._delta(delta, item.index, names))]}))
            return events

        return write

    def _mould(self, moulds: dict[tuple[int, str], Mould], head: dict[str, Any], index: int, kind: str) -> Mould:
        """For chunks of one answer's content, or of its reasoning."""

        def shape(text: str) -> dict[str, Any]:
            delta = {"content": text} if kind == "content" else self._reasoned(text)
            return head | {"choices": [_chunk(index, delta)]}

        moulds[index, kind] = Mould(shape)
        return moulds[index, kind]

    def _chat_choices(self, request: ChatRequest, item: Merged, names: dict[tuple[int, int], str]) -> list[dict[str, Any]]:
        if item.piece is None:
            return [_chunk(item.index, {}, finish_word(item.ticket))]
        deltas = [self._delta(delta, item.index, names) for delta in item.piece.deltas if delta.text or delta.name or delta.arguments]
        wants_ids = request.return_token_ids or (request.logprobs and item.piece.logprobs)
        if not deltas and wants_ids:
            deltas = [{"content": ""}]
        choices = [_chunk(item.index, delta) for delta in deltas]
        if choices and request.logprobs:
            choices[0]["logprobs"] = {"content": self.chat_logprobs(item.piece.logprobs), "refusal": None}
        if choices and request.return_token_ids:
            choices[0]["token_ids"] = list(item.piece.ids)
        return choices

    def _delta(self, delta: Delta, index: int, names: dict[tuple[int, int], str]) -> dict[str, Any]:
        if delta.kind == "content":
            return {"content": delta.text}
        if delta.kind == "reasoning":
            return self._reasoned(delta.text)
        call: dict[str, Any] = {"index": delta.index, "function": {"arguments": delta.arguments}}
        if (index, delta.index) not in names:
            names[index, delta.index] = new_id("call_")
            call |= {"id": names[index, delta.index], "type": "function", "function": {"name": delta.name, "arguments": delta.arguments}}
        return {"tool_calls": [call]}

    def _reasoned(self, text: str) -> dict[str, str]:
        names = ("reasoning_content", "reasoning") if self.reasoning == "both" else (self.reasoning,)
        return dict.fromkeys(names, text)

    def chat_logprobs(self, entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any]]:
        """One entry per token that was sampled; those that a thinking budget put in have none."""
        return [
            self._token(entry.token, entry.logprob) | {"top_logprobs": [self._token(token, value) for token, value in entry.top]}
            for entry in entries
            if entry is not None
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.bytes_of(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}

    # ---- completions

    def completion(self, request: CompletionRequest, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """A whole `text_completion`."""
        choices = []
        for index, ticket in enumerate(tickets):
            done = ticket.answer.completion()
            text = self._echo(ticket) + done.text if request.echo else done.text
            choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": finish_word(ticket), "logprobs": None}
            if request.logprobs is not None:
                entries = list(ticket.answer.logprobs)
                choice["logprobs"] = self._plain_logprobs(
                    [None, *(done.prompt_logprobs or ()), *entries] if request.echo else entries, ticket, 0
                )
            if request.return_token_ids:
                choice |= {"token_ids": list(ticket.answer.ids), "prompt_token_ids": list(ticket.job.request.prompt)}
            if request.prompt_logprobs is not None:
                choice["prompt_logprobs"] = self._prompt_logprobs(ticket)
            choices.append(choice)
        return self._head("text_completion") | {"choices": choices, "usage": usage(tickets, per_prompt=request.n)}

    async def completion_chunks(self, request: CompletionRequest, tickets: Sequence[Ticket], outlet: Outlet) -> AsyncIterator[bytes]:
        """An event with a `text_completion` for each piece. Raises `Failure` when the engine broke."""
        counts = request.stream_options is not None and request.stream_options.continuous_usage_stats
        head = self._head("text_completion")
        await tickets[0].begun()
        if request.echo:
            for index, ticket in enumerate(tickets):
                echo = _plain_chunk(index, self._echo(ticket))
                yield event(head | {"choices": [echo]} | ({"usage": usage(tickets, per_prompt=request.n)} if counts else {}))
        async for data in as_events(tickets, self._plain_events(request, tickets, head, counts), outlet):
            yield data
        if request.stream_options is not None and request.stream_options.include_usage:
            yield event(head | {"choices": [], "usage": usage(tickets, per_prompt=request.n)})
        yield DONE

    def _plain_events(
        self, request: CompletionRequest, tickets: Sequence[Ticket], head: dict[str, Any], counts: bool
    ) -> Callable[[Merged], list[bytes]]:
        """What says a piece in events."""
        bare = not (counts or request.logprobs is not None or request.return_token_ids)  # then nothing but the text differs
        moulds = [_plain_mould(head, index) for index in range(len(tickets))] if bare else []
        shown = dict.fromkeys(range(len(tickets)), 0)

        def write(item: Merged) -> list[bytes]:
            if bare and item.piece is not None:
                text = _text(item.piece)
                return [moulds[item.index].fill(text)] if text else []
            choice = self._plain_choice(request, item, shown)
            if choice is None:
                return []
            return [event(head | {"choices": [choice]} | ({"usage": usage(tickets, per_prompt=request.n)} if counts else {}))]

        return write

    def _plain_choice(self, request: CompletionRequest, item: Merged, shown: dict[int, int]) -> dict[str, Any] | None:
        choice = _plain_chunk(item.index, "")
        if item.piece is None:
            return choice | {"finish_reason": finish_word(item.ticket)}
        choice["text"] = _text(item.piece)
        if request.logprobs is not None:
            choice["logprobs"] = self._plain_logprobs(item.piece.logprobs, item.ticket, shown[item.index])
            shown[item.index] += len(choice["text"])
        if request.return_token_ids:
            choice["token_ids"] = list(item.piece.ids)
        return choice if choice["text"] or request.logprobs is not None or request.return_token_ids else None

    def _echo(self, ticket: Ticket) -> str:
        return self.tokenizer.decode(ticket.job.request.prompt)

    def _plain_logprobs(self, entries: Sequence[TokenLogprobs | None], ticket: Ticket, offset: int) -> dict[str, Any]:
        """The old form: four lists. None stands for the first token of an echoed prompt, of which nothing is known."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token = ticket.job.request.prompt[0] if entry is None else entry.token
            text = self._token(token, 0.0)["token"]
            lists["tokens"].append(text)
            lists["text_offset"].append(offset)
            lists["token_logprobs"].append(None if entry is None else max(entry.logprob, -9999.0))
            lists["top_logprobs"].append(None if entry is None else {self._token(id, 0.0)["token"]: value for id, value in entry.top})
            offset += len(text)
        return lists

    # ---- both

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _prompt_extras(self, ids: bool, tickets: Sequence[Ticket], scored: bool) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if ids:
            extras["prompt_token_ids"] = list(tickets[0].job.request.prompt)
        if scored:
            extras["prompt_logprobs"] = self._prompt_logprobs(tickets[0])
        return extras

    def _prompt_logprobs(self, ticket: Ticket) -> list[dict[str, Any] | None]:
        """As vLLM writes them: null for the first token, then id -> log probability, rank aside."""
        found: list[dict[str, Any] | None] = [None]
        for entry in ticket.answer.completion().prompt_logprobs or ():
            pairs = {entry.token: entry.logprob, **dict(entry.top)}
            found.append(
                {str(token): {"logprob": value, "decoded_token": self._token(token, 0.0)["token"]} for token, value in pairs.items()}
            )
        return found


def _chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """The choice of a chat's chunk."""
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}


def _plain_chunk(index: int, text: str) -> dict[str, Any]:
    """The choice of a completion's chunk."""
    return {"index": index, "text": text, "finish_reason": None, "logprobs": None}


def _plain_mould(head: dict[str, Any], index: int) -> Mould:
    return Mould(lambda text: head | {"choices": [_plain_chunk(index, text)]})


def _text(piece: Piece) -> str:
    deltas = piece.deltas
    return deltas[0].text if len(deltas) == 1 else "".join([delta.text for delta in deltas])


def finish_word(ticket: Ticket) -> str:
    """OpenAI's word for why an answer ended."""
    finish = ticket.answer.finish
    if ticket.answer.calls_done and finish == "stop":
        return "tool_calls"
    return str(finish)


def usage(tickets: Sequence[Ticket], per_prompt: int | None = None) -> dict[str, Any]:
    """Tokens so far. The answers of one prompt share it: it counts once for each `per_prompt` tickets (None: all)."""
    step = per_prompt or max(1, len(tickets))
    prompt = sum(ticket.answer.prompt_tokens for ticket in tickets[::step])
    cached = sum(ticket.answer.cached_tokens for ticket in tickets[::step])
    written = sum(len(ticket.answer.ids) for ticket in tickets)
    seen = {f"{kind}_tokens": sum(ticket.answer.request.seen_tokens(kind) for ticket in tickets[::step]) for kind in ("image", "video")}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached} | {name: count for name, count in seen.items() if count},
        "completion_tokens_details": {
            "reasoning_tokens": sum(ticket.answer.reasoning_tokens for ticket in tickets),
            "accepted_prediction_tokens": sum(ticket.answer.accepted_tokens for ticket in tickets),
            "rejected_prediction_tokens": sum(ticket.answer.drafted_tokens - ticket.answer.accepted_tokens for ticket in tickets),
        },
    }
