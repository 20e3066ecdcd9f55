"""The engine: requests in, tokens out, one step at a time. It knows ids only; text belongs to `client`.

engine = Engine(decoder, EngineConfig())
engine.submit(request)
while not engine.idle:
    for output in engine.step(): ...
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ernie45 import ops
from ernie45.engine.adapters import Adapters
from ernie45.engine.cache import PagedCache
from ernie45.engine.draft_model import Draft, ModelDrafter
from ernie45.engine.draft_mtp import MtpDrafter
from ernie45.engine.drafter import Drafter, NgramDrafter
from ernie45.engine.experts_load import ExpertsLoad
from ernie45.engine.eyes import Eyes
from ernie45.engine.grammar import Grammars
from ernie45.engine.output import BankLoad, Output
from ernie45.engine.packed_cache import KV_BITS, PackedCache, packed_bytes_per_token
from ernie45.engine.request import FinishReason, Request
from ernie45.engine.runner import Runner, StepResult, merged
from ernie45.engine.scheduler import Load, Plan, Scheduler, SchedulerConfig
from ernie45.engine.speculate import Speculation, SpeculationConfig
from ernie45.errors import ConfigError, RequestError
from ernie45.machine import ask_huge_pages, available_memory
from ernie45.models.adapter_folder import AdapterFolder
from ernie45.models.config import TextConfig
from ernie45.models.counts import kv_bytes_per_token
from ernie45.models.memory import CACHE_SHARE, PICTURE_BYTES, Use
from ernie45.models.text import Decoder, check_tokens
from ernie45.quant.spec import QuantSpec, Scheme
from ernie45.tokens.pictures import Picture, PixelRules

_EMBEDDING = "\0embedding"  # who holds the adapter of a text to embed
_IDLE_SHARE = 4
_RGB = 3
_ALONE = 16  # times its budget the vision tower gets in a step when no answer is being written


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine; `resolve` turns what is None (automatic) into numbers. Raises `ConfigError`.

    page_size       tokens per page of the cache
    num_pages       None = room for max_running sequences of max_length, within half of the available memory
    max_length      longest sequence, prompt and output; None = what the model and the cache can hold
    token_budget    tokens computed per step; larger reads prompts faster, smaller keeps answers smooth while prompts are read
    idle_budget     the same while no answer is being written; None = four times token_budget
    max_running     sequences served at the same time
    max_adapters    adapters in memory at the same time, and adapter_bytes their bytes altogether
    kv              keys and values in the cache: "whole" (the compute type), "int8" or "int4"
    vision_budget   billions of multiplications the vision tower may do in a step beside answers that are being written; larger sees
                    sooner, smaller keeps answers smooth
    picture_bytes   of encoded pictures in memory; a single request may have more
    huge_pages      asks for pages of 2 MiB for the cache, which is then taken in larger pieces
    speculation     who guesses tokens ahead of the model, and how many
    """

    page_size: int = 32
    num_pages: int | None = None
    max_length: int | None = None
    token_budget: int = 512
    idle_budget: int | None = None
    max_running: int = 32
    prefix_sharing: bool = True
    max_adapters: int = 8
    adapter_bytes: int = 1 << 30
    kv: str = "whole"
    vision_budget: int = 10
    picture_bytes: int = PICTURE_BYTES
    huge_pages: bool = False
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)

    def __post_init__(self) -> None:
        if self.kv != "whole" and self.kv not in KV_BITS:
            raise ConfigError(f"kv is '{self.kv}'; allowed: whole, {', '.join(KV_BITS)}")
        names = ("page_size", "num_pages", "max_length", "token_budget", "idle_budget", "max_running", "max_adapters", "adapter_bytes")
        for name in (*names, "vision_budget", "picture_bytes"):
            value = getattr(self, name)
            if value is None and name in ("num_pages", "max_length", "idle_budget"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")

    def bytes_per_token(self, model: TextConfig, dtype: torch.dtype) -> int:
        """Cache bytes of one token."""
        block = kv_bytes_per_token(replace(model, num_layers=1), dtype.itemsize) if self.speculation.by == "mtp" else 0
        own = kv_bytes_per_token(model, dtype.itemsize) if self.kv == "whole" else packed_bytes_per_token(model, KV_BITS[self.kv])
        return own + block

    def use(
        self,
        model: TextConfig,
        dtype: torch.dtype,
        *,
        adapters: bool,
        packed: bool,
        draft: Draft | None = None,
        spec: QuantSpec | None = None,
        stored: torch.dtype | None = None,
    ) -> Use:
        """What these settings mean for the memory of a model, with or without packed matrices and adapters, beside a draft model.

        spec: how its files are packed; a model that is packed as it is loaded has a head of 8 bits. stored: the type of most weights.
        """
        head = None if spec is None else spec.scheme_for("embed" if model.tie_embeddings else "head")
        # as `models.native` knows it: matrices stored as bfloat16 stay so beside activations in float32
        known = (packed or torch.bfloat16 in (dtype, stored)) and not (model.use_bias or model.head_bias)
        return Use(
            value_bytes=dtype.itemsize,
            token_bytes=self.bytes_per_token(model, dtype) + (0 if draft is None else draft.bytes_per_token),
            page_size=self.page_size,
            num_pages=self.num_pages,
            max_length=self.max_length,
            step_tokens=max(self.token_budget, self.idle_budget or _IDLE_SHARE * self.token_budget),
            max_running=self.max_running,
            sketched=packed and (spec is None or (isinstance(head, Scheme) and head.weight_bits == 8)),
            native=known and ops.KERNELS is not None and self.kv == "whole" and not adapters,
            input_bytes=1 if packed else dtype.itemsize,
            adapter_bytes=self.adapter_bytes if adapters else 0,
            picture_bytes=self.picture_bytes,
        )

    def resolve(self, model: TextConfig, dtype: torch.dtype, available: int, draft: Draft | None = None) -> SchedulerConfig:
        """Every number fixed, for a model, a compute type, so many available bytes and a draft model. Raises `ConfigError` when it
        cannot be done."""
        wanted = self.max_length or model.max_positions
        if wanted > model.max_positions:
            raise ConfigError(f"max_length is {wanted}; the model knows positions for {model.max_positions}")
        page_bytes = self.page_size * (self.bytes_per_token(model, dtype) + (0 if draft is None else draft.bytes_per_token))
        per_sequence = -(-wanted // self.page_size)
        fitting = int(available * CACHE_SHARE) // page_bytes
        pages = self.num_pages if self.num_pages is not None else min(fitting, per_sequence * self.max_running)
        if pages < 1 or (self.max_length is not None and pages < per_sequence):
            raise ConfigError(
                f"a sequence of {wanted} tokens needs {per_sequence} pages of {page_bytes:,} bytes, the cache has {pages}: "
                f"set a smaller max_length or more num_pages ({available:,} bytes of memory are available, half of them for the cache)"
            )
        return SchedulerConfig(
            token_budget=self.token_budget,
            idle_budget=self.idle_budget or _IDLE_SHARE * self.token_budget,
            max_running=self.max_running,
            page_size=self.page_size,
            num_pages=pages,
            max_length=min(wanted, pages * self.page_size),
            prefix_sharing=self.prefix_sharing,
        )


class Engine:
    """A decoder, its paged cache and the scheduler over it. One thread at a time may call it.

    limits      the resolved settings, for printing
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig | None = None,
        *,
        available: int | None = None,
        grammars: Grammars | None = None,
        adapters: AdapterFolder | None = None,
        rules: PixelRules | None = None,
        new_seed: Callable[[], int] = lambda: secrets.randbits(63),
        on_fault: Callable[[str, Exception], None] = lambda request_id, error: None,
        clock: Callable[[], float] = time.perf_counter,
        draft: Draft | None = None,
    ) -> None:
        """available: bytes of memory, asked from the system when None. grammars: compiler for requests with a grammar; None refuses them.

        adapters: what requests may name; None refuses all. rules: how pictures are made for a model that sees.
        new_seed: for requests without a seed. on_fault: told of each request that ended alone because its part of a step
        broke, and how. clock: seconds, by which drafting is judged.
        draft: the model that guesses where `config.speculation` asks for one.
        """
        free = available_memory() if available is None else available
        config = config or EngineConfig()
        self.limits = config.resolve(decoder.config, decoder.dtype, free, draft)
        self.model = decoder.config
        self.bytes_per_token = config.bytes_per_token(decoder.config, decoder.dtype)
        self._new_seed = new_seed
        self._on_fault = on_fault
        self._grammars = grammars
        self._scheduler = Scheduler(self.limits)
        self._untold: list[Output] = []  # ends of requests whose step broke
        self._adapters = Adapters(decoder, adapters, config.max_adapters, config.adapter_bytes) if adapters is not None else None
        self._experts = ExpertsLoad(decoder)
        self._eyes = _eyes(decoder, rules, config.picture_bytes)
        self._vision_budget = config.vision_budget * 10**9
        self._clock = clock
        drafter = _drafter(config.speculation.by, decoder, draft, self.limits)
        self._speculation = Speculation(config.speculation.most) if drafter is not None else None
        self._runner = Runner(decoder, _cache(config, self.limits, decoder), self._adapters, self._eyes, drafter, clock, self._experts.text)

    @property
    def rules(self) -> PixelRules | None:
        """How pictures are to be made for it; None for a model that sees none."""
        return self._eyes.rules if self._eyes is not None else None

    @property
    def idle(self) -> bool:
        """True when no request is alive and every end has been told."""
        return self._scheduler.idle and not self._untold and not (self._eyes and self._eyes.waiting)

    @property
    def load(self) -> Load:
        """How busy it is. Requests whose pictures are being encoded wait."""
        load = self._scheduler.load
        return replace(load, waiting=load.waiting + self._eyes.waiting) if self._eyes is not None else load

    def experts_load(self) -> tuple[BankLoad, ...]:
        """As `ExpertsLoad.read`; empty for a model without experts."""
        return self._experts.read()

    def check(self, request: Request) -> int:
        """max_tokens as it would be served. Raises `RequestError` (names the field) when the request could not be."""
        request.check_vocabulary(self.model.vocab_size)
        if self._eyes is not None:
            self._eyes.check(request)
        elif request.pictures:
            raise RequestError("this model sees no pictures; leave them out", "messages")
        return self._scheduler.check_fits(request)

    def starts(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, ...]:
        """Where in a prompt of ids each picture begins. Raises `RequestError` when there is no place for one, or the model sees none."""
        if not pictures:
            return ()
        if self._eyes is None:
            raise RequestError("this model sees no pictures; leave them out", "pictures")
        return self._eyes.starts(prompt, pictures)

    def submit(self, request: Request) -> None:
        """Puts a request into the queue. Raises `RequestError` when it can never be served."""
        self.check(request)
        matcher = None
        if request.grammar:
            if self._grammars is None:
                raise RequestError("this engine was made without a tokenizer, so it cannot follow a grammar", "grammar")
            matcher = self._grammars.matcher(request.grammar, sorted(request.end_ids))
        if request.adapter and not self._scheduler.has(request.id):
            request = replace(request, adapter=self._hold(request.id, request.adapter))
        if self._eyes is not None and (self._eyes.has(request.id) or self._scheduler.has(request.id)):
            raise RequestError(f"a request with the id '{request.id}' is already alive", "id")
        if self._eyes is None or self._eyes.begin(request):
            self._scheduler.add(request)
        self._runner.admit(request, self._new_seed() if request.params.seed is None else request.params.seed, matcher)

    def cancel(self, request_id: str) -> bool:
        """Ends a request: nothing more comes of it, and its pages are free. False when it was not alive."""
        waited = self._forget(request_id)
        self._untold = [output for output in self._untold if output.request_id != request_id]
        return self._scheduler.cancel(request_id) or waited

    def step(self) -> tuple[Output, ...]:
        """Computes one step; empty when only parts of prompts were read, or nothing was to do.

        When it breaks (out of memory, a bug), its rows are computed one by one: who breaks alone ends with an error, `on_fault` is told.
        When every row breaks, or the step is interrupted, all its requests end, their pages are free, and the exception goes on to the
        caller; the next call tells of the ends.
        """
        self._look()
        plan = self._scheduler.plan(self._speculation.lengths(self._scheduler.decoding) if self._speculation is not None else None)
        outputs, self._untold = self._untold, []
        if not plan.rows:
            return tuple(outputs)
        try:
            began = self._clock()
            result, undone = self._computed(plan)
            seconds = self._clock() - began - result.drafting
        except BaseException:
            for progress in self._scheduler.abandon(plan):
                self._forget(progress.request_id)
                outputs.append(Output(progress.request_id, (), (), (), progress.finish, progress.cached_tokens))
            self._untold = outputs
            raise
        scored = dict(result.prompt_logprobs)
        for progress in self._scheduler.commit(plan, result.sampled, result.failed, undone):
            name = progress.request_id
            logprobs = result.logprobs.get(name, ())
            told = (
                scored.pop(name, ()),
                progress.finish,
                progress.cached_tokens,
                result.drafted.get(name, 0),
                result.accepted.get(name, 0),
            )
            outputs.append(Output(name, progress.tokens, logprobs, *told))
            if progress.finish is not None:
                self._forget(name)
        outputs += [Output(name, (), (), entries, None, 0) for name, entries in scored.items()]
        if self._speculation is not None:
            self._speculation.note(plan, result.drafted, result.accepted, seconds, result.drafting)
        return tuple(outputs)

    def _computed(self, plan: Plan) -> tuple[StepResult, frozenset[str]]:
        """The result of a plan, and rows that must begin anew. Raises what the runner raises when no row can be computed."""
        try:
            return self._runner.run(plan), frozenset()
        except Exception as error:
            if len(plan.rows) == 1:
                raise
            return self._row_by_row(plan, error)

    def _row_by_row(self, plan: Plan, error: Exception) -> tuple[StepResult, frozenset[str]]:
        """As `_computed`, one row at a time. Computing a row again writes the same values into the same places of the cache.

        A row may share pages that an earlier row fills in this very step; when that one breaks they hold nothing, and the row is not run.
        """
        results: list[StepResult] = []
        broken: dict[str, Exception] = {}
        undone: set[str] = set()
        empty: set[int] = set()
        for row in plan.rows:
            begun = row.start // self.limits.page_size
            if empty.intersection(row.pages[:begun]):
                undone.add(row.request_id)
                continue
            try:
                results.append(self._runner.run(Plan((row,))))
            except Exception as alone:  # noqa: BLE001  it is told, by the end of its request and to `on_fault`
                broken[row.request_id] = alone
                empty.update(row.pages[begun:])
        if len(broken) == len(plan.rows):
            raise error
        for request_id, alone in broken.items():
            self._on_fault(request_id, alone)
        return merged(results, broken), frozenset(undone)

    def embed(self, tokens: Sequence[int], adapter: str = "") -> list[float]:
        """Mean over a text's tokens of the last hidden states behind the final norm, scaled to length 1; [D].

        Computed whole and apart from the cache. Raises `RequestError` for a text that is empty, too long or not of this vocabulary.
        """
        check_tokens(tokens, self.model)
        try:
            if adapter:
                self._hold(_EMBEDDING, adapter)
            return self._runner.embed(tokens, _EMBEDDING)
        finally:
            self._drop(_EMBEDDING)

    def _hold(self, request_id: str, adapter: str) -> str:
        if self._adapters is None:
            raise RequestError("this engine was made without adapters", "model")
        return self._adapters.hold(request_id, adapter)

    def _drop(self, request_id: str) -> None:
        if self._adapters is not None:
            self._adapters.drop(request_id)

    def _forget(self, request_id: str) -> bool:
        """True when its pictures were not encoded yet."""
        self._runner.forget(request_id)
        if self._speculation is not None:
            self._speculation.forget(request_id)
        self._drop(request_id)
        return self._eyes is not None and self._eyes.forget(request_id)

    def _look(self) -> None:
        """Encodes pictures that are waited for, and lets the scheduler have the requests that have all of theirs."""
        if self._eyes is None or not self._eyes.waiting:
            return
        try:
            for request in self._eyes.look(self._vision_budget * (1 if self._scheduler.load.running else _ALONE)):
                self._scheduler.add(request)
        except BaseException:
            for name in self._eyes.lost():
                self._forget(name)
                self._untold.append(Output(name, (), (), (), FinishReason.error, 0))
            raise

    def verify(self) -> None:
        """Proves that pages and requests agree; meant for idle moments and tests."""
        self._scheduler.check()
        if self._eyes is not None:
            self._eyes.verify()


def _eyes(decoder: Decoder, rules: PixelRules | None, capacity: int) -> Eyes | None:
    """For a decoder that sees colours. Raises `ConfigError` when the rules cut other patches than its tower reads."""
    if decoder.sight is None or decoder.sight.config.channels != _RGB:
        return None
    vision = decoder.sight.config
    rules = rules or PixelRules(patch=vision.patch_size, merge=vision.merge)
    if (rules.patch, rules.merge) != (vision.patch_size, vision.merge):
        raise ConfigError(
            f"the folder's rules cut patches of {rules.patch} pixels, {rules.merge} x {rules.merge} to a token; its vision tower reads "
            f"patches of {vision.patch_size}, {vision.merge} x {vision.merge}: mend preprocessor_config.json or config.json"
        )
    return Eyes(decoder.sight, rules, decoder.config.hidden_size, capacity)


def _drafter(by: str, decoder: Decoder, draft: Draft | None, limits: SchedulerConfig) -> Drafter | None:
    """Who guesses. Raises `ConfigError` when it cannot be."""
    match by:
        case "ngram":
            return NgramDrafter()
        case "mtp":
            return MtpDrafter(decoder, limits.num_pages, limits.page_size)
        case "draft":
            assert draft is not None, "whoever asks for drafts of a model loads it"
            return ModelDrafter(draft.decoder, decoder.config.vocab_size, limits.num_pages, limits.page_size)
    return None


def _cache(config: EngineConfig, limits: SchedulerConfig, decoder: Decoder) -> PagedCache | PackedCache:
    cache: PagedCache | PackedCache
    if config.kv == "whole":
        cache = PagedCache(decoder.config, limits.num_pages, limits.page_size, decoder.dtype)
        stores = (cache.store,)
    else:
        cache = PackedCache(decoder.config, limits.num_pages, limits.page_size, decoder.dtype, KV_BITS[config.kv])
        stores = (cache.values, cache.scales)
    for store in stores if config.huge_pages else ():
        ask_huge_pages(store.data_ptr(), store.nbytes, filled=False)
    return cache
