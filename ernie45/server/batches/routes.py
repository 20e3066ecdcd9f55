"""OpenAI's routes of files and batches. Whoever has a key sees what was made with that key, and nothing else."""

import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import IO, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field

from ernie45.server.batches.runner import Runner
from ernie45.server.batches.storage import Storage
from ernie45.server.batches.upload import read_upload
from ernie45.server.body import read_json
from ernie45.server.failures import Failure, bad
from ernie45.server.openapi import body_of
from ernie45.server.protocol import Fields, read_fields
from ernie45.server.service import Service

_PIECE = 256 << 10
_WINDOW = re.compile(r"[1-9][0-9]{0,2}h")
_LONGEST_WINDOW = 168  # hours
_EXPIRY = (3600, 2592000)  # seconds
PURPOSES = ("batch", "batch_output")


class ExpiresAfter(Fields):
    """How long a file is kept, in seconds."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=_EXPIRY[0], le=_EXPIRY[1])


class BatchRequest(Fields):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: str
    metadata: dict[str, str] | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = None


def add_batches(app: FastAPI, service: Service, storage: Storage | Failure, runner: Runner | None) -> None:
    """/v1/files and /v1/batches. With a failure in place of a storage, that is what every route answers."""

    def ready() -> Storage:
        if isinstance(storage, Failure):
            raise storage
        return storage

    _add_files(app, service, ready)

    @app.post("/v1/batches", tags=["OpenAI"], openapi_extra=body_of(BatchRequest))
    async def create(request: Request) -> JSONResponse:
        """Runs the lines of an uploaded file, behind all requests that somebody waits for."""
        store, limits, owner = ready(), service.settings.limits, request.state.caller.owner
        asked = read_fields(BatchRequest, await read_json(request, limits), {})
        if service.draining:
            raise Failure(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        hours = _hours(asked.completion_window)
        metadata = _metadata(asked.metadata or {})
        kept = asked.output_expires_after.seconds if asked.output_expires_after else None

        def make() -> dict[str, Any]:
            try:
                file = store.files.find(asked.input_file_id, owner)
            except Failure as failure:
                raise bad(str(failure), "input_file_id", "not_found") from None
            if file.purpose != "batch":
                raise bad(f"the file {file.id} is no batch's input: its purpose is {file.purpose}", "input_file_id")
            made = store.batches.create(owner, file, asked.endpoint, hours, metadata=metadata, kept=kept, most=limits.unfinished_batches)
            return made.body()

        body = await store.run(make)
        if runner is not None:
            runner.wake()
        return JSONResponse(body)

    @app.get("/v1/batches", tags=["OpenAI"], openapi_extra=_query(after=str, limit=int))
    async def batches(request: Request) -> JSONResponse:
        """Batches, the newest first."""
        return await _listed(request, ready(), lambda store: store.batches.page, _page_of(request, 20, 100))

    @app.get("/v1/batches/{id}", tags=["OpenAI"])
    async def batch(request: Request, id: str) -> JSONResponse:
        """One batch, and how far it is."""
        store = ready()
        return JSONResponse(await store.run(lambda: store.batches.find(id, request.state.caller.owner).body()))

    @app.post("/v1/batches/{id}/cancel", tags=["OpenAI"])
    async def cancel(request: Request, id: str) -> JSONResponse:
        """Ends a batch; what it has done is in its files."""
        store = ready()
        body = await store.run(lambda: store.batches.cancel(id, request.state.caller.owner).body())
        if runner is not None:
            runner.cancel(id)
        return JSONResponse(body)


def _add_files(app: FastAPI, service: Service, ready: Any) -> None:
    form = {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": ["batch"]}}
    form |= {"expires_after[anchor]": {"type": "string", "enum": ["created_at"]}, "expires_after[seconds]": {"type": "integer"}}
    schema = {"type": "object", "properties": form, "required": ["file", "purpose"]}

    body = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}

    @app.post("/v1/files", tags=["OpenAI"], openapi_extra=body)
    async def upload(request: Request) -> JSONResponse:
        """Takes a file of JSON lines for a batch."""
        store, limits, owner = ready(), service.settings.limits, request.state.caller.owner
        if service.draining:
            raise Failure(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        taken = await read_upload(request, store, limits)

        def keep() -> dict[str, Any]:
            try:
                seconds = _form_fields(taken.fields)
                files, size = store.files.used(owner)
                if files >= limits.files or size + taken.part.size > limits.storage_bytes:
                    text = f"this key has {files} files of {size:,} bytes; at most {limits.files:,} of {limits.storage_bytes:,} are kept"
                    raise Failure(413, f"{text}: delete some", field="file", code="storage_quota")
            except Failure:
                taken.part.drop()
                raise
            return store.files.keep(taken.part, owner, taken.name, "batch", seconds).body()

        return JSONResponse(await store.run(keep))

    @app.get("/v1/files", tags=["OpenAI"], openapi_extra=_query(after=str, limit=int, order=str, purpose=str))
    async def files(request: Request) -> JSONResponse:
        """Files, the newest first unless `order` is asc."""
        page = _page_of(request, 10_000, 10_000, ("order", "purpose"))
        order = page.pop("order", "desc")
        if order not in ("asc", "desc"):
            raise bad("order must be asc or desc", "order")
        return await _listed(request, ready(), lambda store: store.files.page, page | {"newest": order == "desc"})

    @app.get("/v1/files/{id}", tags=["OpenAI"])
    async def file(request: Request, id: str) -> JSONResponse:
        """What is known of a file."""
        store = ready()
        return JSONResponse(await store.run(lambda: store.files.find(id, request.state.caller.owner).body()))

    @app.get("/v1/files/{id}/content", tags=["OpenAI"])
    async def content(request: Request, id: str) -> Response:
        """A file's bytes, whole."""
        store = ready()
        found = await store.run(store.files.find, id, request.state.caller.owner)
        opened = await store.run(store.files.open, found)
        headers = {"content-length": str(found.bytes), "content-disposition": "attachment", "cache-control": "private, no-store"}
        return StreamingResponse(_pieces(store, opened), headers=headers, media_type="application/octet-stream")

    @app.delete("/v1/files/{id}", tags=["OpenAI"])
    async def delete(request: Request, id: str) -> JSONResponse:
        """Forgets a file that no batch reads."""
        store = ready()
        await store.run(store.files.delete, id, request.state.caller.owner)
        return JSONResponse({"id": id, "object": "file", "deleted": True})


async def _pieces(store: Storage, opened: IO[bytes]) -> AsyncIterator[bytes]:
    with opened:
        while data := await store.run(opened.read, _PIECE):
            yield data


def _form_fields(fields: Mapping[str, str]) -> int | None:
    """Seconds the file is kept. Raises `Failure` 400 naming the field."""
    known = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
    for name in fields:
        if name not in known:
            raise Failure(400, f"{name[:80]} is not a field of this form", field=name[:80], code="unknown_parameter")
    if "purpose" not in fields:
        raise bad("purpose is missing", "purpose", "missing_required_parameter")
    if fields["purpose"] != "batch":
        raise bad(f"purpose must be batch: files are kept for batches only, not for '{fields['purpose'][:80]}'", "purpose")
    given = {name: fields[f"expires_after[{name}]"] for name in ("anchor", "seconds") if f"expires_after[{name}]" in fields}
    if not given:
        return None
    seconds = given.get("seconds", "")
    if given.get("anchor") != "created_at":
        raise bad("expires_after[anchor] must be created_at", "expires_after.anchor")
    if not (seconds.isascii() and seconds.isdecimal() and len(seconds) < 10 and _EXPIRY[0] <= int(seconds) <= _EXPIRY[1]):
        raise bad(f"expires_after[seconds] must be from {_EXPIRY[0]} to {_EXPIRY[1]}", "expires_after.seconds")
    return int(seconds)


def _hours(window: str) -> int:
    if not _WINDOW.fullmatch(window) or int(window[:-1]) > _LONGEST_WINDOW:
        raise bad(f"completion_window must be a number of hours such as 24h, at most {_LONGEST_WINDOW}h", "completion_window")
    return int(window[:-1])


def _metadata(given: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in given.items():
        if len(name) > 64 or len(value) > 512:
            raise bad("metadata has keys of at most 64 characters and values of at most 512", "metadata")
    return given


def _page_of(request: Request, usual: int, most: int, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """A list's query: `after`, `limit`, and what `more` names. Raises `Failure` 400 naming what is unknown or wrong."""
    asked: dict[str, Any] = dict(request.query_params)
    for name in asked:
        if name not in ("after", "limit", *more):
            raise Failure(400, f"{name[:80]} is not a parameter of this list", field=name[:80], code="unknown_parameter")
    given = asked.get("limit", str(usual))
    if not (given.isascii() and given.isdecimal() and len(given) < 8 and 1 <= int(given) <= most):
        raise bad(f"limit must be from 1 to {most:,}", "limit")
    return {"after": None} | asked | {"limit": int(given)}


async def _listed(
    request: Request, store: Storage, pages: Callable[[Storage], Callable[..., Any]], page: Mapping[str, Any]
) -> JSONResponse:
    """A page of the caller's own, as OpenAI writes lists. pages: what reads one."""

    def read() -> dict[str, Any]:
        found, more = pages(store)(request.state.caller.owner, **page)
        data = [item.body() for item in found]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, **ends, "has_more": more}

    return JSONResponse(await store.run(read))


def _query(**names: type) -> dict[str, Any]:
    """What the OpenAPI page says of a list's query."""
    words = {str: "string", int: "integer"}
    return {
        "parameters": [{"name": name, "in": "query", "required": False, "schema": {"type": words[kind]}} for name, kind in names.items()]
    }
