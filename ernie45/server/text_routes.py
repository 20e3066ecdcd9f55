"""Routes about text itself: tokenize, detokenize, apply_template, embeddings."""

import base64
import struct
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ernie45.errors import TokenizerError
from ernie45.server.body import read_json
from ernie45.server.failures import bad
from ernie45.server.openapi import body_of
from ernie45.server.prepare import CHAT_FIELDS, Context, chat_prompt, prompts_of
from ernie45.server.protocol import REFUSED, ChatRequest, EmbeddingRequest, Fields, read_fields
from ernie45.server.service import Service
from ernie45.server.stream import unless_gone


class TokenizeRequest(Fields):
    """A text, as it is: no bos or eos is added, and control tokens in it are text."""

    model: str | None = None
    prompt: str
    return_token_strs: bool = False


class DetokenizeRequest(Fields):
    """Ids of a text."""

    model: str | None = None
    tokens: list[int] = Field(max_length=1_000_000)


def add_text(app: FastAPI, service: Service) -> None:
    """POST /tokenize, /detokenize, /apply_template, /v1/embeddings."""
    limits = service.settings.limits

    @app.post("/tokenize", tags=["text"], openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> JSONResponse:
        """The ids of a text."""
        asked = read_fields(TokenizeRequest, await read_json(request, limits), {})
        _, context = await service.context(asked.model, request.state.caller)
        tokenizer = context.text.tokenizer
        ids = await service.prepare(tokenizer.encode, asked.prompt)
        body: dict[str, Any] = {"count": len(ids), "max_model_len": context.info.limits.max_length, "tokens": ids}
        return JSONResponse(body | ({"token_strs": [tokenizer.token_of(id) for id in ids]} if asked.return_token_strs else {}))

    @app.post("/detokenize", tags=["text"], openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> JSONResponse:
        """The text of ids, control tokens shown."""
        asked = read_fields(DetokenizeRequest, await read_json(request, limits), {})
        _, context = await service.context(asked.model, request.state.caller)
        try:
            return JSONResponse({"prompt": context.text.tokenizer.decode(asked.tokens, skip_special=False)})
        except TokenizerError as error:
            raise bad(str(error), "tokens") from None

    @app.post("/apply_template", tags=["text"], openapi_extra=body_of(ChatRequest))
    async def apply_template(request: Request) -> JSONResponse:
        """The prompt that a chat request would make: its text and its ids. Takes what /v1/chat/completions takes."""
        asked = read_fields(ChatRequest, await read_json(request, service.body_limits), REFUSED["chat"])
        _, context = await service.context(asked.model, request.state.caller)
        prompted = await service.prepare_chat(chat_prompt, asked, context, fields=CHAT_FIELDS)
        try:
            text = context.text.tokenizer.decode(prompted.ids, skip_special=False)
        except TokenizerError as error:  # a template makes none that the tokenizer does not know
            raise bad(str(error), "prompt_token_ids") from None
        return JSONResponse({"prompt": text, "tokens": list(prompted.ids), "count": len(prompted.ids)})

    @app.post("/v1/embeddings", tags=["OpenAI"], openapi_extra=body_of(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """Texts as vectors of length 1: the mean of the last hidden states behind the norm. Of a chat model, not a trained encoder."""
        asked = read_fields(EmbeddingRequest, await read_json(request, limits), REFUSED["embeddings"])
        return await unless_gone(request, embedded(service, request, asked))


async def embedded(service: Service, request: Request, asked: EmbeddingRequest) -> Response:
    """The response to a checked embedding request. Raises `Failure`."""
    model, context = await service.context(asked.model, request.state.caller)
    width = context.info.width
    if asked.dimensions is not None and asked.dimensions != width:
        raise bad(f"dimensions is {asked.dimensions}; this model's vectors have {width} and cannot be shortened", "dimensions")
    texts = await service.prepare(_texts, asked, context)
    data = []
    for index, tokens in enumerate(texts):
        vector = await model.embed(tokens, context.adapter)
        shown: Any = list(vector)
        if asked.encoding_format == "base64":
            shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    used = sum(map(len, texts))
    service.rates.use(request.state.caller, used, service.now())
    request.state.told.update(model=model.name, prompt_tokens=used, user=asked.user)
    name = asked.model or model.name
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": {"prompt_tokens": used, "total_tokens": used}})


def _texts(asked: EmbeddingRequest, context: Context) -> list[tuple[int, ...]]:
    texts = prompts_of(asked.input, context, "input")
    for ids in texts:
        if len(ids) > context.info.limits.max_length:
            raise bad(
                f"a text has {len(ids)} tokens; the model reads at most {context.info.limits.max_length}",
                "input",
                "context_length_exceeded",
            )
        if max(ids) >= context.info.vocab_size or min(ids) < 0:
            raise bad(f"input holds a token id outside 0 .. {context.info.vocab_size - 1}", "input")
    return texts
