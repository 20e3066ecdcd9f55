"""A small server that the page is tested against: it answers by rule, as fast as a test wants, and remembers what it was asked."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ernie45.server import pages

MODELS = [
    {"id": "tiny", "capabilities": {"vision": False, "thinking": True}, "defaults": {"temperature": 0.8, "top_p": 0.8}},
    {"id": "tiny:poet", "parent": "tiny"},
    {"id": "eyes", "capabilities": {"vision": True, "thinking": True}},
    {"id": "plain", "capabilities": {"vision": False, "thinking": False}},
]


@dataclass
class Reply:
    """What to stream: thinking, text and tool calls in pieces, the pause between them, and how the stream ends."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    pause: float = 0.0
    size: int = 7
    ending: str = "stop"  # "break": the connection ends early; "error": an error event; anything else: the finish reason


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


class FakeServer:
    """Runs in a thread of its own; `replies` answers by the last word of the person, `requests` holds the bodies that came."""

    def __init__(self):
        self.reset()
        app = FastAPI(openapi_url=None)
        app.include_router(pages.router())
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/status.json", self.status, methods=["GET"])
        app.add_api_route("/favicon.ico", lambda: Response(status_code=204), methods=["GET"])
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def reset(self):
        self.key = None
        self.models_status = 200
        self.failure = None  # (status, body, headers): what the chat route answers with instead
        self.replies = {}
        self.requests = []
        self.closed = 0
        self.state = {}
        self.state_status = 200

    def start(self) -> str:
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the fake server ended while it started"
            threading.Event().wait(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def stop(self):
        self.server.should_exit = True
        self.server.force_exit = True
        self.thread.join(10)

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "a key is needed", "type": "authentication_error"}}, status_code=401)

    async def models(self, request: Request) -> Response:
        if self.models_status != 200:
            return Response(status_code=self.models_status)
        return self.refused(request) or JSONResponse({"object": "list", "data": MODELS})

    async def status(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse(self.state, status_code=self.state_status)

    async def chat(self, request: Request) -> Response:
        refusal = self.refused(request)
        if refusal:
            return refusal
        body = await request.json()
        self.requests.append(body)
        if self.failure:
            status, answer, headers = self.failure
            return JSONResponse(answer, status_code=status, headers=headers)
        return StreamingResponse(self.events(self.reply_to(body)), media_type="text/event-stream")

    def reply_to(self, body: dict) -> Reply:
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
        reply = self.replies.get(text.strip())
        if reply is None:
            return Reply(f"Answer {len(self.requests)} to: {text}")
        return reply if isinstance(reply, Reply) else Reply(reply)

    async def events(self, reply: Reply) -> AsyncIterator[str]:
        sent = 0
        try:
            # A comment and odd line ends: both are allowed in an event stream.
            yield ": hello\r\n\r\n"
            for delta in self.deltas(reply):
                sent += 1
                yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\r\n\r\n"
                await asyncio.sleep(reply.pause)
            for event in self.endings(reply, sent):
                yield f"data: {event}\n\n"
        except asyncio.CancelledError:
            self.closed += 1
            raise

    @staticmethod
    def deltas(reply: Reply) -> list[dict]:
        found = [{"role": "assistant", "content": ""}]
        found += [{"reasoning_content": piece} for piece in pieces(reply.reasoning, reply.size)]
        found += [{"content": piece} for piece in pieces(reply.content, reply.size)]
        for i, call in enumerate(reply.tool_calls):
            found.append({"tool_calls": [{"index": i, "id": call["id"], "function": {"name": call["name"], "arguments": ""}}]})
            found += [{"tool_calls": [{"index": i, "function": {"arguments": piece}}]} for piece in pieces(call["arguments"], 5)]
        return found

    @staticmethod
    def endings(reply: Reply, sent: int) -> list[str]:
        if reply.ending == "break":
            return []
        if reply.ending == "error":
            return [json.dumps({"error": {"message": "the engine lost this request", "type": "server_error", "code": 500}})]
        usage = {"prompt_tokens": 11, "completion_tokens": sent}
        finish = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if reply.tool_calls else reply.ending}]}
        return [json.dumps(finish), json.dumps({"choices": [], "usage": usage}), "[DONE]"]
