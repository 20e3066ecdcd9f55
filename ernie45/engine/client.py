"""`LLM`: a model folder that generates, chats and streams. The text side of the engine, for one thread of one process.

llm = LLM("starter")
llm.chat("Why is the sky blue?", SamplingParams(max_tokens=200)).text
for delta in llm.stream("Tell me a story."): print(delta.text, end="")
"""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ernie45 import ops
from ernie45.config import Environment
from ernie45.engine.answer import Answer, Completion
from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.draft_model import check_draft, load_draft
from ernie45.engine.output import Output
from ernie45.engine.request import PlacedPicture, Request, SamplingParams
from ernie45.engine.scheduler import Load, SchedulerConfig
from ernie45.engine.speculate import DRAFT_TOKENS, SpeculationConfig, check_mtp
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.engine.threads import Crew
from ernie45.errors import CheckpointError, ConfigError, RequestError
from ernie45.machine import available_memory
from ernie45.models.adapter_folder import AdapterFolder
from ernie45.models.compute import ComputeType
from ernie45.models.load import OpenModel, load
from ernie45.models.memory import Held, MemoryPlan, check_fits, gib, plan_memory
from ernie45.models.on_the_fly import load_quantised
from ernie45.models.text import Decoder
from ernie45.tokens.gguf_vocabulary import tokenizer_from_gguf
from ernie45.tokens.messages import Message, as_messages
from ernie45.tokens.parse import Delta
from ernie45.tokens.pictures import Picture, PixelRules, read_pixel_rules
from ernie45.tokens.sight import PictureReader, Sources, place_pictures
from ernie45.tokens.template import ChatTemplate, Prompt, load_template
from ernie45.tokens.tokenizer import Tokenizer, load_tokenizer
from ernie45.weights.gguf import GgufFile
from ernie45.weights.stream import Progress

Messages = str | Sequence[Message | Mapping[str, Any]]
Prompts = str | Sequence[str | Sequence[int]]


class Stream:
    """An answer being made: iterate over its deltas. Leaving the loop early, `close()` or a `with`'s end stops it and frees its pages."""

    def __init__(self, llm: "LLM", answer: Answer) -> None:
        self._llm = llm
        self._answer = answer

    def __iter__(self) -> Iterator[Delta]:
        for deltas in self.steps():
            yield from deltas

    def steps(self) -> Iterator[list[Delta]]:
        """The deltas of each step of the engine; an empty list when a step brought nothing to show."""
        try:
            while self._answer.finish is None:
                self._llm.step()
                yield self._answer.deltas()
            if rest := self._answer.deltas():
                yield rest
        finally:
            self.close()

    def close(self) -> None:
        """Stops the answer unless it is over."""
        self._llm.drop([self._answer])

    @property
    def over(self) -> bool:
        """Whether the answer is complete."""
        return self._answer.finish is not None

    @property
    def completion(self) -> Completion:
        """The whole answer, or what there is of it."""
        return self._answer.completion()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LLM:
    """A decoder with its tokenizer and chat template, behind one engine.

    compute    the compute type and why, when the model was loaded here
    limits     the engine's resolved settings
    plan       the memory that was reckoned before it was loaded here
    seating    the threads that were chosen, None when torch's were left as they are
    """

    def __init__(
        self,
        model: str | Path | Decoder,
        *,
        dtype: str = "auto",
        quantize: str | None = None,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        chat_format: str | None = None,
        page_size: int = 32,
        num_pages: int | None = None,
        max_length: int | None = None,
        token_budget: int = 512,
        idle_budget: int | None = None,
        max_running: int = 32,
        prefix_sharing: bool = True,
        adapters: str | Path | None = None,
        max_adapters: int = 8,
        adapter_bytes: int = 1 << 30,
        kv: str = "whole",
        speculative: str = "off",
        draft_model: str | None = None,
        draft_tokens: int = DRAFT_TOKENS,
        text_only: bool = False,
        rules: PixelRules | None = None,
        memory: int | None = None,
        threads: ThreadSettings | None = None,
        progress: Progress | None = None,
        environment: Environment | None = None,
    ) -> None:
        """model: folder, .gguf file, published name, "starter", or a decoder (then with `tokenizer` and `template`, or ids only).

        quantize rounds a float model's matrices as they are loaded, such as "w4a8" (`models.on_the_fly`).
        chat_format names a known chat format for a model without a template of its own. adapters: a folder of PEFT adapters, which the
        methods below name by their folders' names. text_only leaves what a model sees with in its files; rules: how pictures are made for
        a decoder that sees (a folder brings its own). memory: bytes that weights, work and cache may take; None = what is available. What
        does not fit is refused before its weights are read. speculative, draft_model and draft_tokens: who guesses tokens ahead, see
        `SpeculationConfig`. threads: how many compute and where, for this whole process; None leaves torch's as they are. The engine's
        settings: see `EngineConfig`.
        Raises CheckpointError, TokenizerError or ConfigError.
        """
        config = EngineConfig(
            page_size=page_size,
            num_pages=num_pages,
            max_length=max_length,
            token_budget=token_budget,
            idle_budget=idle_budget,
            max_running=max_running,
            prefix_sharing=prefix_sharing,
            max_adapters=max_adapters,
            adapter_bytes=adapter_bytes,
            kv=kv,
            huge_pages=threads is not None and threads.huge_pages == "on",
            speculation=SpeculationConfig(by=speculative, draft_model=draft_model, most=draft_tokens),
        )
        environment = environment or Environment.read()
        crew = None if threads is None else Crew(threads, cache=environment.cache_dir)
        self._speculation = config.speculation
        folder = None if adapters is None else AdapterFolder(Path(adapters))
        self.tokenizer, self.template = tokenizer, template
        self.compute, self.name, self._unseen = "as the decoder was given", "decoder", ""
        self._without_template = "this model was given without a chat template"
        self.plan: MemoryPlan | None = None
        free: int | None = None
        draft = load_draft(draft_model, environment, dtype) if draft_model else None
        check_mtp(config.speculation, quantize)
        if isinstance(model, Decoder):
            if quantize is not None:
                raise ConfigError("quantize rounds a model as it is loaded; this one is loaded already (see quant.model.quantise_model)")
            decoder = model
        else:
            available = available_memory() if memory is None else memory

            def approve(opened: OpenModel, compute: ComputeType, held: Held) -> None:
                packed = opened.spec is not None or quantize is not None
                kind: dict[str, Any] = {"adapters": folder is not None, "packed": packed, "draft": draft}
                use = config.use(opened.config, compute.dtype, spec=opened.spec, stored=opened.stored, **kind)
                self.plan = plan_memory(opened.described, held if draft is None else replace(held, total=held.total + draft.size), use)
                check_fits(self.plan, available, str(model), opened.described, use, packed=packed)
                if crew is not None:
                    crew.before_loading(self.plan.least)

            how: dict[str, Any] = {"dtype": dtype, "text_only": text_only, "environment": environment}
            how |= {"progress": progress, "approve": approve}
            mtp = speculative == "mtp"
            loaded = load(model, mtp=mtp, compact=True, **how) if quantize is None else load_quantised(model, quantize, **how)
            assert self.plan is not None
            free = available - self.plan.fixed
            decoder, self.compute, self.name = loaded.decoder, str(loaded.compute), str(model)
            self._unseen = loaded.opened.unseen
            self._read_text_side(loaded.opened, chat_format)
            rules = _pixel_rules(decoder, loaded.opened, rules)
            check_draft(draft, self.tokenizer)
        self.seating = None if crew is None else crew.after_loading(decoder, "" if isinstance(model, Decoder) else str(model))
        self._engine = Engine(decoder, config, adapters=folder, rules=rules, available=free, draft=draft)
        # the files are the caller's own: any path may be read
        self.sight = PictureReader(rules=self._engine.rules, sources=Sources(paths=True)) if self._engine.rules is not None else None
        self._dtype = decoder.dtype
        self._live: dict[str, Answer] = {}
        self._asked = 0

    @property
    def limits(self) -> SchedulerConfig:
        """The engine's settings, every number resolved."""
        return self._engine.limits

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        return self._engine.load

    def settings(self) -> dict[str, str]:
        """What was resolved, for people to read."""
        limits = self.limits
        size = limits.num_pages * limits.page_size * self._engine.bytes_per_token
        return {
            "model": self.name,
            "compute": self.compute,
            "kernels": ops.describe(),
            "context": f"{limits.max_length:,} tokens",
            **({} if self.plan is None else {"memory": f"{self.plan.text(size)}, together at most {gib(self.plan.fixed + size)}"}),
            **({"unseen": self._unseen} if self._unseen else {}),
            "cache": f"{limits.num_pages:,} pages of {limits.page_size} tokens, at most {gib(size)}, taken as it fills",
            "step": limits.describe(),
            "threads": str(torch.get_num_threads()) if self.seating is None else self.seating.text(),
            **({} if self._speculation.by == "off" else {"drafts": self._speculation.text()}),
            "chat format": self.template.source if self.template else "none",
        }

    def render(self, messages: Messages, *, thinking: bool | int | None = None, tools: Sequence[Mapping[str, Any]] | None = None) -> Prompt:
        """The prompt that `chat` would send. Raises RequestError or TokenizerError as the template does."""
        return self._render(messages, thinking, tools)[0]

    def _render(
        self, messages: Messages, thinking: bool | int | None, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Prompt, tuple[PlacedPicture, ...]]:
        if self.template is None:
            raise RequestError(f"{self._without_template}; use generate, or name a chat_format", "messages")
        checked = as_messages([Message("user", messages)] if isinstance(messages, str) else messages)
        pictures: tuple[Picture, ...] = ()
        if any(message.media for message in checked):
            if self.sight is None:
                raise RequestError("this model sees no images or videos, or was loaded without its eyes; leave them out", "messages")
            checked, pictures = self.sight.look(checked)
        prompt = self.template.render(checked, thinking=thinking, tools=tools)
        return prompt, tuple(PlacedPicture(span.start, picture) for span, picture in zip(prompt.media, pictures, strict=True))

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str = "",
        pictures: Sequence[Sequence[Picture]] | None = None,
    ) -> list[Completion]:
        """Continues each prompt (text, or ids); one completion per prompt, in order. Raises RequestError before anything is computed.

        pictures: those of each prompt, in order. In a text `<|image@placeholder|>` and `<|video@placeholder|>` say where they stand; ids
        hold the placeholder tokens already.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        settings = [params or SamplingParams()] * len(several) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(settings) != len(several):
            raise RequestError(f"there are {len(several)} prompts and {len(settings)} params; give one for all, or one for each", "params")
        shown: Sequence[Sequence[Picture]] = [()] * len(several) if pictures is None else pictures
        if len(shown) != len(several):
            raise RequestError(f"there are {len(several)} prompts, and pictures for {len(shown)}; give a list for each", "pictures")
        answers = [self._plain(prompt, setting, adapter, seen) for prompt, setting, seen in zip(several, settings, shown, strict=True)]
        try:
            for answer in answers:
                self._submit(answer)
            while any(answer.finish is None for answer in answers):
                self.step()
        finally:
            self.drop(answers)
        return [answer.completion() for answer in answers]

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        thinking: bool | int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        adapter: str = "",
    ) -> Completion:
        """Answers a conversation (a text is one user message). thinking: on, off, or the most tokens of reasoning."""
        with self.stream(messages, params, thinking=thinking, tools=tools, adapter=adapter) as stream:
            for _ in stream.steps():
                pass
            return stream.completion

    def stream(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        thinking: bool | int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        adapter: str = "",
    ) -> Stream:
        """As `chat`, piece by piece. The request is checked and queued at once; several streams may be open, each drives all."""
        prompt, pictures = self._render(messages, thinking, tools)
        assert self.template is not None
        request = self._request(prompt.ids, params, self.template.stop_ids, adapter, pictures)
        answer = Answer(
            request,
            self._engine.check(request),
            time.perf_counter(),
            tokenizer=self.tokenizer,
            reply_format=self.template.reply_format,
            starts_in=prompt.starts_in,
            budget=thinking if isinstance(thinking, int) and not isinstance(thinking, bool) and thinking > 0 else None,
        )
        self._submit(answer)
        return Stream(self, answer)

    def stream_text(self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, adapter: str = "") -> Stream:
        """As `generate` for one prompt, piece by piece."""
        answer = self._plain(prompt, params or SamplingParams(), adapter)
        self._submit(answer)
        return Stream(self, answer)

    def step(self) -> None:
        """One step of the engine for every open answer."""
        outputs = self._engine.step()
        now = time.perf_counter()
        for output in outputs:
            self._take(self._live[output.request_id], output, now)

    def _take(self, answer: Answer, output: Output, now: float) -> None:
        for single in output.one_by_one():
            answer.take(single, now)
            if over_budget := answer.over_budget:
                self._engine.cancel(output.request_id)
                if (following := answer.closing()) is not None:
                    self._engine.submit(following)
            if answer.finish is not None:
                self.drop([answer])
            if over_budget or answer.finish is not None:
                return

    def drop(self, answers: Sequence[Answer]) -> None:
        """Ends answers and frees what they hold."""
        for answer in answers:
            if self._live.pop(answer.request.id, None) is not None:
                self._engine.cancel(answer.request.id)
            answer.cancel()

    def _submit(self, answer: Answer) -> None:
        self._engine.submit(answer.request)
        self._live[answer.request.id] = answer

    def _plain(self, prompt: str | Sequence[int], params: SamplingParams, adapter: str, pictures: Sequence[Picture] = ()) -> Answer:
        """An answer to a prompt that no template has touched. Raises RequestError."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model was given without a tokenizer; give the prompt as token ids", "prompt")
            ids: Sequence[int]
            starts: Sequence[int]
            ids, starts = place_pictures(prompt, pictures, self.tokenizer) if pictures else (self.tokenizer.encode(prompt), ())
        else:
            ids, starts = prompt, self._engine.starts(prompt, pictures)
        eos = self.tokenizer.eos_ids if self.tokenizer is not None and self.tokenizer.eos_ids else self._engine.model.eos_ids
        request = self._request(ids, params, eos, adapter, tuple(map(PlacedPicture, starts, pictures)))
        return Answer(request, self._engine.check(request), time.perf_counter(), tokenizer=self.tokenizer)

    def _request(
        self,
        ids: Sequence[int],
        params: SamplingParams | None,
        eos: tuple[int, ...],
        adapter: str,
        pictures: tuple[PlacedPicture, ...] = (),
    ) -> Request:
        params = SamplingParams() if params is None else params
        if self.tokenizer is None and isinstance(params, SamplingParams) and params.stop:
            raise RequestError("this model was given without a tokenizer, so it cannot find stop strings; use stop_token_ids", "stop")
        self._asked += 1
        prompt = cast(tuple[int, ...], ids)
        return Request(id=str(self._asked), prompt=prompt, params=params, eos_ids=eos, adapter=adapter, pictures=pictures)

    def _read_text_side(self, opened: OpenModel, chat_format: str | None) -> None:
        """Tokenizer and template from the model's folder, or from its GGUF file's metadata."""
        with tempfile.TemporaryDirectory() as made:
            folder = opened.path
            if isinstance(opened.files, GgufFile):
                folder = Path(made)
                tokenizer, settings = tokenizer_from_gguf(opened.files.metadata)
                (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
                (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
            self.tokenizer = self.tokenizer or load_tokenizer(folder)
            try:
                self.template = self.template or load_template(folder, self.tokenizer, chat_format)
            except CheckpointError as error:
                self._without_template = str(error)


def _pixel_rules(decoder: Decoder, opened: OpenModel, given: PixelRules | None) -> PixelRules | None:
    """How pictures are made for a model that sees, as its folder says; what was given for one that does not."""
    if decoder.sight is None:
        return given
    vision = decoder.sight.config
    return read_pixel_rules(opened.path, PixelRules(patch=vision.patch_size, merge=vision.merge))
