"""Traces of requests for OpenTelemetry: one span for the request and one each for waiting, reading the prompt and writing.

Spans are made when an answer is over, from the times its ticket kept, so that nothing is paid while it runs. They carry counts and names,
never prompts or answers.
"""

import time
from typing import Any

from ernie45.errors import MissingExtra
from ernie45.server.model import Observer, Step
from ernie45.server.ticket import Ticket

SERVICE = "ernie45"


class Telemetry:
    """Is told what happens, tells it on to `inner`, and sends what is over as spans."""

    def __init__(self, inner: Observer, exporter: Any) -> None:
        """exporter: an OpenTelemetry `SpanExporter`. Raises `MissingExtra`."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "opentelemetry-sdk", "telemetry") from None
        self._inner = inner
        # a provider of our own and not the process's: two servers in one process do not mix
        self._provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE)

    def stepped(self, model: str, step: Step) -> None:
        """The engine made a step."""
        self._inner.stepped(model, step)

    def finished(self, model: str, ticket: Ticket) -> None:
        """An answer is over."""
        self._inner.finished(model, ticket)
        if ticket.ended is None:
            return
        # tickets keep the loop's clock, which has no date; this one is over now
        shift = time.time() - ticket.ended
        answer = ticket.answer
        told = {
            "gen_ai.request.model": model,
            "gen_ai.response.id": ticket.id,
            "gen_ai.usage.input_tokens": answer.prompt_tokens,
            "gen_ai.usage.output_tokens": len(answer.ids),
            "ernie.cached_tokens": answer.cached_tokens,
            "ernie.finish": ticket.failure.code or "error" if ticket.failure is not None else str(answer.finish),
        }
        self._span("request", None, ticket.came + shift, ticket.ended + shift, told, self._parts(ticket, shift))

    def _parts(self, ticket: Ticket, shift: float) -> list[tuple[str, float, float]]:
        ended = ticket.ended or 0.0
        marks = [("queue", ticket.came), ("prefill", ticket.began), ("decode", ticket.first)]
        begun = [(name, at) for name, at in marks if at is not None]
        ends = [at for _, at in begun[1:]] + [ended]
        return [(name, at + shift, end + shift) for (name, at), end in zip(begun, ends, strict=True)]

    def _span(self, name: str, context: Any, start: float, end: float, told: dict[str, Any], parts: list[tuple[str, float, float]]) -> None:
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(name, context=context, start_time=int(start * 1e9), attributes=told)
        for part, begin, stop in parts:
            self._span(part, set_span_in_context(span), begin, stop, {}, [])
        span.end(int(end * 1e9))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def otlp_exporter(endpoint: str) -> Any:
    """An exporter that posts spans to a collector's address. Raises `MissingExtra`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "opentelemetry-exporter-otlp-proto-http", "telemetry") from None
    return OTLPSpanExporter(endpoint=endpoint, timeout=5)
