"""A model that answers a conversation: `engine.client.LLM` as the chat sees it, with a name, a sampling and a count of tokens.

One engine lives as long as the conversation, so a later turn finds the earlier ones in shared pages and reads only what is new.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie45.config import Environment, read_table
from ernie45.engine.speculate import DRAFT_TOKENS
from ernie45.engine.thread_settings import ThreadSettings
from ernie45.errors import CheckpointError, ConfigError, RequestError
from ernie45.models.adapter_folder import CONFIG
from ernie45.recipes.answer import Outcome, Piece
from ernie45.recipes.conversation import Turn
from ernie45.recipes.terminal import progress_bar

if TYPE_CHECKING:
    from ernie45.engine.client import LLM, Stream
    from ernie45.engine.request import SamplingParams

Sampling = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The content of generation_config.json -> the fields of `SamplingParams`."""

# Sampling fields that change nothing at these values, so that they need not be told.
_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": None}


def open_speaker(
    model: str,
    environment: Environment,
    *,
    dtype: str,
    thinking: bool | int | None,
    sampling: Sampling,
    chat: bool,
    adapter: Path | None = None,
    quantize: str | None = None,
    kv: str = "whole",
    speculative: str = "off",
    draft_model: str | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    text_only: bool = False,
    threads: ThreadSettings | None = None,
) -> "ModelSpeaker":
    """Find, load and prepare a model, with progress on stderr. With `chat` a model that only continues text is refused.

    adapter: the folder of a PEFT adapter that the model answers with.

    Raises ErnieError subclasses for every mistake in the name, the files or the settings.
    """
    if adapter is not None:
        adapter = adapter.resolve()
        if not (adapter / CONFIG).is_file():
            raise ConfigError(f"--adapter: {adapter} holds no {CONFIG}; give the folder of a PEFT adapter")
    with progress_bar(environment) as progress:
        progress("starting", 0, 0)  # importing torch takes a second or two
        from ernie45.engine.client import LLM
        from ernie45.engine.request import SamplingParams
        from ernie45.models.load import find_model

        path = find_model(model, environment, lambda stage: progress(stage, 0, 0))
        params = SamplingParams(**sampling(read_generation_config(path)))
        llm = LLM(
            path,
            dtype=dtype,
            quantize=quantize,
            kv=kv,
            speculative=speculative,
            draft_model=draft_model,
            draft_tokens=draft_tokens,
            max_running=1,
            text_only=text_only,
            threads=threads,
            adapters=None if adapter is None else adapter.parent,
            environment=environment,
            progress=lambda stage, done, total: progress(stage if quantize else "loading weights", done, total),
        )
    speaker = ModelSpeaker(llm, model_name(path), params, thinking, "" if adapter is None else adapter.name)
    if llm.template is None and thinking:
        raise ConfigError(f"{speaker.name} is a base model and has no thinking; leave --thinking out")
    if chat:
        _check_chat(speaker, llm, model)
    return speaker


def _check_chat(speaker: "ModelSpeaker", llm: "LLM", model: str) -> None:
    """Raises `CheckpointError` for a model that holds no conversations, `RequestError` for a setting that its chat format does not know."""
    if llm.template is None:
        try:
            llm.render("Hello")
        except RequestError as error:
            begin = f'ernie chat {model} --prompt "Once upon a time"'
            raise CheckpointError(f"{speaker.name} cannot chat: {error}. It can continue a text: {begin}") from None
    speaker.count([Turn(role="user", content="Hello")])


def model_name(path: Path) -> str:
    """What the model is, honestly: what its config says it was made from, else the name of its folder or file."""
    try:
        source = json.loads((path / "config.json").read_text(encoding="utf-8"))["ernie45_source"]
    except (OSError, ValueError, KeyError, TypeError):
        return path.stem if path.suffix == ".gguf" else path.resolve().name
    return str(source).partition(";")[0]


def read_generation_config(path: Path) -> dict[str, Any]:
    """The folder's generation_config.json, empty when there is none. Raises `CheckpointError` when it is damaged."""
    file = path / "generation_config.json"
    if path.suffix == ".gguf" or not file.is_file():
        return {}
    data = read_table(file)
    return data


class ModelSpeaker:
    """A loaded model with its name and sampling settings; a base model continues the one text it is given."""

    def __init__(self, llm: "LLM", name: str, params: "SamplingParams", thinking: bool | int | None, adapter: str = "") -> None:
        self._llm, self._params, self._thinking, self._adapter = llm, params, thinking, adapter
        self.name = f"{name} with {adapter}" if adapter else name
        self.limit = llm.limits.max_length

    def count(self, turns: Sequence[Turn]) -> int:
        """Tokens of the prompt that `turns` make."""
        if self._llm.template is None:
            assert self._llm.tokenizer is not None
            return len(self._llm.tokenizer.encode(_only_text(self.name, turns)))
        return len(self._llm.render(_messages(turns), thinking=self._thinking).ids)

    def reply(self, turns: Sequence[Turn], retry: int = 0) -> "ModelReply":
        """Begin an answer. A fixed seed is moved on by `retry`, or the same answer would come again."""
        seed = self._params.seed
        params = self._params if seed is None else replace(self._params, seed=seed + retry)
        began = time.perf_counter()
        if self._llm.template is None:
            return ModelReply(self._llm.stream_text(_only_text(self.name, turns), params, adapter=self._adapter), began)
        return ModelReply(self._llm.stream(_messages(turns), params, thinking=self._thinking, adapter=self._adapter), began)

    def settings(self) -> dict[str, str]:
        """What was resolved, for people to read."""
        told = {name: getattr(self._params, name) for name in ("temperature", *_OFF)}
        kept = [f"{name} {value}" for name, value in told.items() if name not in _OFF or value != _OFF[name]]
        settings = self._llm.settings()
        settings["sampling"] = "greedy" if self._params.greedy else ", ".join(kept)
        return {name: value for name, value in settings.items() if name != "model"}


class ModelReply:
    """An answer of the engine as pieces; see `answer.Reply`."""

    def __init__(self, stream: "Stream", began: float) -> None:
        self._stream = stream
        self._began = began
        self._ended: float | None = None

    def __iter__(self) -> Iterator[Piece]:
        """Pieces as they come; a step without text gives an empty one, so that the reader may stop it there."""
        for deltas in self._stream.steps():
            yield from [Piece(delta.kind, delta.text) for delta in deltas if delta.kind != "tool_call"] or [Piece("content", "")]
        self.close()

    def close(self) -> None:
        """Stop early, or do nothing when it is over."""
        self._stream.close()
        self._ended = self._ended or time.perf_counter()

    @property
    def outcome(self) -> Outcome:
        """What the answer came to."""
        done = self._stream.completion
        return Outcome(
            prompt_tokens=done.prompt_tokens,
            answer_tokens=len(done.token_ids),
            finish_reason=str(done.finish_reason),
            first_token_s=done.timing.prefill if done.timing.tokens else None,
            total_s=(self._ended or time.perf_counter()) - self._began,
            tool_calls=tuple(asdict(call) for call in done.tool_calls),
        )


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": _content(turn), "reasoning": turn.reasoning or None} for turn in turns]


def _content(turn: Turn) -> str | list[dict[str, str]]:
    """The text, or with pictures a list of parts, the pictures first."""
    media = [{"type": "image", "image": name} for name in turn.images] + [{"type": "video", "video": name} for name in turn.videos]
    return [*media, {"type": "text", "text": turn.content}] if media else turn.content


def _only_text(name: str, turns: Sequence[Turn]) -> str:
    if len(turns) != 1:
        raise RequestError(f"{name} is a base model, which continues one text: leave the system message out", "system")
    if turns[0].images or turns[0].videos:
        raise RequestError(f"{name} is a base model, which continues one text: leave images and videos out", "messages")
    return turns[0].content
