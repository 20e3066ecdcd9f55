"""Messages -> the ids a model sees, and which of them training learns: one renderer for training and for serving.

    template = load_template(folder, tokenizer)
    prompt = template.render([{"role": "user", "content": "Hello"}])
    prompt.ids         # what the model sees
    prompt.starts_in   # where the reply begins, for ReplyParser

A prompt is built from segments, and only segments that are control tokens become control ids. Text between two control tokens is
encoded as one piece, as the published templates do, except that it is cut where an answer begins: there serving hands over to the
model, so training must see the same ids.

A folder's own template is rendered once over a few probe conversations. Where it writes what one of the known formats writes, the known
format is used, because it also knows what is learned; otherwise the folder's is, in the sandbox. `ChatTemplate.source` says which.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ernie45.errors import CheckpointError, RequestError, TokenizerError, did_you_mean
from ernie45.tokens.folder_template import FolderTemplate, read_folder_template
from ernie45.tokens.formats import FAMILIES, Chat, Family, Segment, chatml
from ernie45.tokens.messages import Image, Message, as_messages
from ernie45.tokens.parse import FORMATS, ReplyFormat
from ernie45.tokens.tokenizer import Tokenizer

IGNORED = -100
"""The label of a place that is not learned, as PyTorch's cross entropy skips it."""

PLACEHOLDER = "<|IMAGE_PLACEHOLDER|>"
"""The token whose id is repeated for every image and video token."""


@dataclass(frozen=True)
class MediaSpan:
    """Where an image or video lies in the ids: `index` counts each kind from 0 over the conversation."""

    kind: Literal["image", "video"]
    index: int
    start: int
    length: int


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    ids        what the model sees
    learned    per id, whether training learns it; all False in a prompt for generation
    labels     per id, the id to learn in its place, or `IGNORED`; an ERNIE answer ends with sep in `ids` and eos here
    text       the conversation as text, media as their placeholder words
    media      where images and videos lie
    starts_in  the block of the reply format that the reply to this prompt begins in
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    labels: tuple[int, ...]
    text: str
    media: tuple[MediaSpan, ...] = ()
    starts_in: str = "content"


@dataclass(frozen=True)
class ChatTemplate:
    """How one model's conversations are written.

    source         the known format's name ("ernie-text", ...), or "folder" for a template only the folder knows
    reply_format   how its replies are read: `ReplyParser(template.reply_format, prompt.starts_in)`
    stop_ids       ids that end an answer
    """

    source: str
    reply_format: ReplyFormat
    stop_ids: tuple[int, ...]
    tokenizer: Tokenizer
    family: Family | None = None
    folder: FolderTemplate | None = None

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | int | None = None,
        add_generation_prompt: bool = True,
        keep_reasoning: bool = False,
    ) -> Prompt:
        """A conversation as a prompt.

        tools                  OpenAI function schemas
        thinking               on, off, a budget in tokens (0 is off), or None for what the model does by itself
        add_generation_prompt  True: ends where the model is to answer, nothing is learned. False: a record for training, in which every
                               answer is learned unless its message says otherwise, and the last one shows its reasoning
        keep_reasoning         whether earlier answers show their reasoning too

        Raises TokenizerError (messages), RequestError with `field` (tools, thinking) when the format cannot say what is asked.
        """
        checked = as_messages(messages)
        _check_tools(tools)
        if self.family is not None:
            chat = Chat(checked, tuple(tools or ()), self.family.resolve_thinking(thinking), add_generation_prompt, keep_reasoning)
            self.family.check(chat)
            prompt = compile_segments(self.family.segments(chat), self.tokenizer, _learns(chat))
        else:
            assert self.folder is not None
            if keep_reasoning:
                raise RequestError("a folder's own chat template decides about reasoning; leave keep_reasoning out", field="keep_reasoning")
            segments = self.folder.segments(checked, tools, thinking, add_generation_prompt, self.tokenizer)
            chat = Chat(checked, generate=add_generation_prompt)
            prompt = compile_segments(segments, self.tokenizer, _learns(chat))
        return _opened(prompt, self.reply_format) if add_generation_prompt else prompt


def compile_segments(segments: Iterable[Segment], tokenizer: Tokenizer, learns: Callable[[int], bool]) -> Prompt:
    """Segments as ids, masks and labels; `learns` says of an answer's message index whether it is learned.

    Raises TokenizerError when a control token is not in the vocabulary, or a medium has not been measured.
    """
    ids: list[int] = []
    labels: list[int] = []
    text: list[str] = []
    media: list[MediaSpan] = []
    run: list[str] = []
    run_kind: tuple[int | None, bool] = (None, False)

    def extend(new: list[int], turn: int | None, label: int | None = None) -> None:
        ids.extend(new)
        learned = turn is not None and learns(turn)
        labels.extend([label if label is not None else id for id in new] if learned else [IGNORED] * len(new))

    def flush() -> None:
        if run:
            extend(tokenizer.encode("".join(run), allow_special=run_kind[1], start=not ids), run_kind[0])
            run.clear()

    for segment in segments:
        text.append(segment.text)
        id = tokenizer.id_of(segment.text) if segment.kind != "text" and segment.media is None else None
        if segment.media is not None:
            flush()
            media.append(_span(segment.media, media, len(ids)))
            extend([required(tokenizer, PLACEHOLDER)] * media[-1].length, None)
        elif segment.kind == "control" or id is not None:
            flush()
            label = tokenizer.named.get(segment.label) if segment.label else None
            extend([required(tokenizer, segment.text)], segment.turn, tokenizer.id_of(label) if label else None)
        elif segment.text:
            kind = (segment.turn, segment.trusted)
            if kind != run_kind:
                flush()
            run_kind = kind
            run.append(segment.text)
    flush()
    return Prompt(tuple(ids), tuple(label != IGNORED for label in labels), tuple(labels), "".join(text), tuple(media))


def required(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token the chat format cannot do without. Raises `TokenizerError`."""
    id = tokenizer.id_of(token)
    if id is None:
        raise TokenizerError(f"the chat format needs the token '{token}', which this tokenizer does not have")
    return id


def _span(part: Any, before: list[MediaSpan], start: int) -> MediaSpan:
    kind: Literal["image", "video"] = "image" if isinstance(part, Image) else "video"
    index = sum(span.kind == kind for span in before)
    if part.tokens is None:
        raise TokenizerError(f"{kind} {index} has not been measured: set how many tokens it takes")
    return MediaSpan(kind, index, start, part.tokens)


def _learns(chat: Chat) -> Callable[[int], bool]:
    return lambda index: not chat.generate and chat.messages[index].learned is not False


def _opened(prompt: Prompt, format: ReplyFormat) -> Prompt:
    """Marks a prompt whose end has opened the thinking block, so that the reply is read as reasoning from its first word."""
    if "reasoning" in format.blocks and prompt.text.rstrip("\n").endswith("<think>"):
        return replace(prompt, starts_in="reasoning")
    return prompt


def _check_tools(tools: object) -> None:
    if tools is None:
        return
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise RequestError(f"tools must be a list of function schemas, not {type(tools).__name__}", field="tools")
    for n, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{n}] needs function.name, a text; got {tool!r:.80}", field=f"tools[{n}]")


# ---- choosing ------------------------------------------------------------------------------------------------------------------

_U, _A, _S = Message("user", "Hi there"), Message("assistant", "Hello."), Message("system", "Be brief.")
_PROBES = ((_U,), (_S, _U), (_U, _A, _U), (_S, _U, _A, Message("user", " two  spaces\n")), (_U, _A))


def family_template(name: str | Family, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a known family, by name. Raises RequestError with the nearest name."""
    if isinstance(name, str):
        if name not in FAMILIES:
            raise RequestError(f"'{name}' is not a known chat format{did_you_mean(name, FAMILIES)}", field="chat_format")
        name = FAMILIES[name]
    stops = [id for token in name.stops if (id := tokenizer.id_of(token)) is not None]
    return ChatTemplate(name.name, FORMATS[name.reply], tuple(dict.fromkeys([*tokenizer.eos_ids, *stops])), tokenizer, family=name)


def load_template(folder: Path, tokenizer: Tokenizer, family: str | None = None) -> ChatTemplate:
    """The chat template of a model folder; `family` forces a known format instead of what the folder says.

    Raises CheckpointError when the folder has no template (a base model, perhaps) or its file is damaged.
    """
    if family is not None:
        return family_template(family, tokenizer)
    own = read_folder_template(Path(folder), tokenizer)
    if own is None:
        raise CheckpointError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): perhaps a base model, which "
            f"continues text and does not chat; to chat all the same, name a format: {', '.join(FAMILIES)}"
        )
    for known in (*FAMILIES.values(), *_chatml_with_system(own)):
        if all(_writes_alike(known, own, probe, generate) for probe in _PROBES for generate in (True, False)):
            return family_template(known, tokenizer)
    format = FORMATS["ernie-thinking" if "<response>" in own.template else "think" if "</think>" in own.template else "plain"]
    stops = [
        id for token in ("<|im_end|>", "<|eot_id|>", "<|end|>") if token in own.template and (id := tokenizer.id_of(token)) is not None
    ]
    return ChatTemplate("folder", format, tuple(dict.fromkeys([*tokenizer.eos_ids, *stops])), tokenizer, folder=own)


def _writes_alike(family: Family, own: FolderTemplate, messages: tuple[Message, ...], generate: bool) -> bool:
    if family.thinking == "switch" and not generate and messages[-1].role == "assistant":
        return True  # our records open the last answer as the prompt would have; published templates know no records
    chat = Chat(messages, thinking=family.resolve_thinking(None), generate=generate)
    try:
        text = own.text([asdict(message) for message in messages], add_generation_prompt=generate)
    except TokenizerError:
        return False
    return text == "".join(segment.text for segment in family.segments(chat))


def _chatml_with_system(own: FolderTemplate) -> list[Family]:
    """ChatML with the default system text this template writes, if it writes one."""
    head, tail = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"
    try:
        text = own.text([asdict(_U)], add_generation_prompt=False)
    except TokenizerError:
        return []
    return [chatml(text[len(head) : text.index(tail)])] if text.startswith(head) and tail in text else []
