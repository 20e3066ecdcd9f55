"""Every way a request can fail, as one value: a status, and a body in the shape of the protocol that was spoken."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from ernie45.errors import ErnieError, RequestError, TokenizerError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Failure(ErnieError):
    """A request that ends with an error status.

    field    the request's field that is wrong, `param` in OpenAI's shape
    code     a word for programs
    headers  to send with it, such as Retry-After
    """

    def __init__(
        self, status: int, text: str, *, field: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.field = field
        self.code = code
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return _TYPES.get(self.status, "server_error")

    def openai(self) -> dict[str, Any]:
        """The body of OpenAI's protocol."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.field, "code": self.code}}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """The body of Anthropic's protocol."""
        kind = "api_error" if self.kind == "server_error" else self.kind
        return {"type": "error", "error": {"type": kind, "message": str(self)}, "request_id": request_id}


def bad(text: str, field: str | None = None, code: str | None = None) -> Failure:
    """400: the caller's mistake."""
    return Failure(400, text, field=field, code=code)


def overloaded(text: str, seconds: float, code: str = "overloaded") -> Failure:
    """503: come back in so many seconds."""
    return Failure(503, text, code=code, headers={"Retry-After": str(max(1, round(seconds)))})


def broken(request_id: str) -> Failure:
    """500: our mistake; the log has the details under the same id, the caller gets nothing that would help an attacker."""
    return Failure(500, f"the server failed on this request; its log says more under {request_id}", code="internal_error")


def engine_lost(request_id: str) -> Failure:
    """500: the engine broke while it computed this request."""
    return Failure(500, f"the model broke while it answered; the log says more under {request_id}", code="engine_error")


def failure_of(error: ErnieError, fields: Mapping[str, str] | None = None) -> Failure:
    """A caller's mistake that the floors below found, as a 400. fields: what the protocol calls a setting of the engine."""
    if isinstance(error, Failure):
        return error
    field = error.field if isinstance(error, RequestError) else ("messages" if isinstance(error, TokenizerError) else None)
    field = (fields or {}).get(field or "", field)
    code = "context_length_exceeded" if "has room for" in str(error) else "invalid_value"
    return Failure(400, str(error), field=field, code=code)


def reason_of(status: int) -> str:
    """A status in words."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "unknown status"
