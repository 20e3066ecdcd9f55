"""What Prometheus reads: own names, and vLLM's where the meaning is equal, so that dashboards and scalers made for it work here."""

import resource
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from ernie45.engine.request import FinishReason
from ernie45.server.recent import Recent
from ernie45.server.ticket import Ticket

if TYPE_CHECKING:
    from ernie45.server.model import ServedModel, Step

_FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_EACH = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_WHOLE = (0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SIZES = (16, 64, 256, 1024, 4096, 16384, 65536, 131072)
_AT_ONCE = 100  # steps
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One registry for one server; told what happens by the models and the door.

    Steps are counted many at a time, or when somebody asks: each brings its own time along, and what is done for one alone, with nothing of
    it in the processor's caches, would be paid by every token.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._recent = Recent()
        self._uncounted: list[tuple[str, Step]] = []
        label = ["model_name"]
        made = {"registry": self._registry}
        self._http = Counter("ernie_http_requests", "HTTP requests by route and status.", ["route", "status"], **made)
        self._failures = Counter("ernie_request_failures", "Answers that ended with a failure, by its code.", [*label, "code"], **made)
        self._finished = Counter("vllm:request_success", "Answers by why they ended.", [*label, "finished_reason"], **made)
        self._prompt = Counter("vllm:prompt_tokens", "Tokens of prompts.", label, **made)
        self._generated = Counter("vllm:generation_tokens", "Tokens of answers.", label, **made)
        self._cached = Counter("ernie_cached_prompt_tokens", "Tokens of prompts that were found in shared pages.", label, **made)
        self._drafted = Counter("vllm:spec_decode_num_draft_tokens", "Tokens that were guessed ahead.", label, **made)
        self._accepted = Counter("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that turned out right.", label, **made)
        self._steps = Counter("ernie_engine_steps", "Steps of the engine.", label, **made)
        self._step_time = Counter("ernie_engine_step_seconds", "Seconds the engine spent in steps.", label, **made)
        self._broken = Counter("ernie_engine_broken_steps", "Steps that broke and took their requests with them.", label, **made)
        self._queue = Histogram("vllm:request_queue_time_seconds", "Seconds in line.", label, buckets=_FIRST, **made)
        self._first = Histogram(
            "vllm:time_to_first_token_seconds", "Seconds from asking to the first token.", label, buckets=_FIRST, **made
        )
        self._each = Histogram(
            "vllm:request_time_per_output_token_seconds", "Seconds per token after the first, by answer.", label, buckets=_EACH, **made
        )
        self._gaps: dict[str, _Gaps] = {}
        self._whole = Histogram("vllm:e2e_request_latency_seconds", "Seconds from asking to the end.", label, buckets=_WHOLE, **made)
        self._prompt_sizes = Histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", label, buckets=_SIZES, **made)
        self._sizes = Histogram("vllm:request_generation_tokens", "Tokens of an answer.", label, buckets=_SIZES, **made)

    def watch(self, models: "Sequence[ServedModel]") -> None:
        """Reads how busy these models are whenever it is asked."""
        self._registry.register(_Gauges(models))
        self._registry.register(_InterToken(self._gaps))

    @property
    def recent(self) -> Recent:
        """The last minutes, for the page of the state."""
        self._count()
        return self._recent

    def answered(self, route: str, status: int) -> None:
        """An HTTP request has been answered."""
        self._http.labels(route, str(status)).inc()

    def stepped(self, model: str, step: "Step") -> None:
        """The engine made a step."""
        self._uncounted.append((model, step))
        if len(self._uncounted) >= _AT_ONCE:
            self._count()

    def _count(self) -> None:
        steps, self._uncounted = self._uncounted, []
        for model, step in steps:
            message = step.message
            self._recent.stepped(step.written, step.read, step.gaps, step.now)
            for gap, count in step.gaps.items():
                self._gaps.setdefault(model, _Gaps()).add(gap, count)
            if message.seconds:
                self._steps.labels(model).inc()
                self._step_time.labels(model).inc(message.seconds)
            if message.broke:
                self._broken.labels(model).inc()

    def finished(self, model: str, ticket: Ticket) -> None:
        """An answer is over."""
        answer, tokens = ticket.answer, len(ticket.answer.ids)
        if ticket.failure is not None:
            self._failures.labels(model, ticket.failure.code or "error").inc()
        else:
            self._finished.labels(model, str(answer.finish)).inc()
        times = _times(ticket)
        end = "errors" if ticket.failure is not None else "" if answer.finish in (FinishReason.stop, FinishReason.length) else "cancelled"
        self.recent.finished(end, times, ticket.ended or ticket.came)
        if not times:
            return
        self._prompt.labels(model).inc(answer.prompt_tokens)
        self._cached.labels(model).inc(answer.cached_tokens)
        self._generated.labels(model).inc(tokens)
        self._drafted.labels(model).inc(answer.drafted_tokens)
        self._accepted.labels(model).inc(answer.accepted_tokens)
        self._prompt_sizes.labels(model).observe(answer.prompt_tokens)
        self._sizes.labels(model).observe(tokens)
        for name, seconds in times.items():
            {"queue": self._queue, "e2e": self._whole, "ttft": self._first, "tpot": self._each}[name].labels(model).observe(seconds)

    def text(self) -> bytes:
        """The page."""
        self._count()
        return generate_latest(self._registry)


def _times(ticket: Ticket) -> dict[str, float]:
    """How long an answer that is over took, in seconds, as `Recent` calls it; empty when it never ran."""
    if ticket.began is None or ticket.ended is None:
        return {}
    times = {"queue": ticket.began - ticket.came, "e2e": ticket.ended - ticket.came}
    if ticket.first is not None:
        times["ttft"] = ticket.first - ticket.came
        if (tokens := len(ticket.answer.ids)) > 1:
            times["tpot"] = (ticket.ended - ticket.first) / (tokens - 1)
    return times


class _Gaps:
    """Seconds between tokens, by class of length. Told of every token of every answer: the client library's own takes a lock for each."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_EACH) + 1)
        self._sum = 0.0

    def add(self, seconds: float, count: int) -> None:
        """So many answers waited so long for a token."""
        self._counts[bisect_left(_EACH, seconds)] += count
        self._sum += seconds * count

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """How many were at most so long, as Prometheus has it."""
        return list(zip([*map(str, map(float, _EACH)), "+Inf"], map(float, accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        """All of them together."""
        return self._sum


class _InterToken:
    """The gaps of all models, as one family."""

    def __init__(self, gaps: Mapping[str, _Gaps]) -> None:
        self._gaps = gaps

    def collect(self) -> Iterator[Metric]:
        """The family."""
        what = "Seconds between a token of an answer and the one before."
        family = HistogramMetricFamily("vllm:inter_token_latency_seconds", what, labels=["model_name"])
        for model, gaps in self._gaps.items():
            family.add_metric([model], gaps.buckets, gaps.sum)
        yield family


class _Gauges:
    """How things stand at the moment of asking."""

    def __init__(self, models: "Sequence[ServedModel]") -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """One family after another."""
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests the engine computes.", labels=["model_name"])
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests in line.", labels=["model_name"])
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the cache's pages in use, 0 to 1.", labels=["model_name"])
        preempted = GaugeMetricFamily("ernie_preemptions", "Requests that lost their pages to others so far.", labels=["model_name"])
        ready = GaugeMetricFamily("ernie_model_ready", "Whether the model is loaded.", labels=["model_name"])
        for model in self._models:
            load, name = model.load, [model.name]
            running.add_metric(name, model.running)
            waiting.add_metric(name, model.waiting)
            usage.add_metric(name, 1 - load.free_pages / load.num_pages if load else 0.0)
            preempted.add_metric(name, load.preemptions if load else 0)
            ready.add_metric(name, float(model.state == "ready"))
        memory = GaugeMetricFamily("ernie_front_peak_memory_bytes", "Most memory the front process has taken.")
        unit = 1 if sys.platform == "darwin" else 1024
        memory.add_metric([], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        yield from (running, waiting, usage, preempted, ready, memory)
