"""Conversations with images and videos -> the same with token counts, for the template, and the pictures themselves, for the engine.

Where a picture may come from is a decision of whoever opened the door: a program that runs on one's own machine reads paths, a server
reads nothing but what the request itself carries, unless it was told otherwise.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ernie45.errors import RequestError
from ernie45.tokens.images import ImageLimits, read_image
from ernie45.tokens.messages import Image, Message, Part, Text, Video, as_messages
from ernie45.tokens.pictures import Picture, PixelRules
from ernie45.tokens.template import PLACEHOLDER, required
from ernie45.tokens.tokenizer import Tokenizer
from ernie45.tokens.video import FrameChoice, VideoLimits, read_video

LOW_DETAIL = 256
"""Tokens of an image whose part asks for detail "low", at most."""

_BASE64_GROUP = 4  # letters for three bytes


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a picture's bytes may come from. What the address itself carries (data:) always may.

    paths   any file this process can read, by path or file: address
    folder  files in this folder, by file: address, absolute or from the folder on; links out of it are not followed
    fetch   what reads http: and https: addresses: (address, most bytes) -> bytes
    """

    paths: bool = False
    folder: Path | None = None
    fetch: Callable[[str, int], bytes] | None = None

    def read(self, source: str, most: int) -> bytes:
        """The bytes behind an address, at most `most`. Raises `RequestError`."""
        scheme = source.partition(":")[0].lower()
        if scheme == "data":
            return _inline(source, most)
        if scheme in ("http", "https"):
            if self.fetch is None:
                raise RequestError("addresses of other machines are not fetched here; send the file itself as a data: address")
            return self.fetch(source, most)
        if scheme == "file":
            return self._file(_path_of(source), most)
        if self.paths:
            return self._file(source, most)
        raise RequestError(f"{source[:80]!r} is no address that is read here; send the file itself as data:image/png;base64,...")

    def _file(self, name: str, most: int) -> bytes:
        if not self.paths and self.folder is None:
            raise RequestError("files of this machine are not read here; send the file itself as a data: address")
        try:
            opened = self._open(name)
            try:
                if not stat.S_ISREG(os.fstat(opened).st_mode):
                    raise RequestError(f"{name[:200]} is no file")
                with open(opened, "rb", closefd=False) as file:
                    data = file.read(most + 1)
            finally:
                os.close(opened)
        except (OSError, RuntimeError, ValueError) as error:
            raise RequestError(f"{name[:200]} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if len(data) > most:
            raise RequestError(f"{name[:200]} is larger than {most:,} bytes")
        return data

    def _open(self, name: str) -> int:
        """A file, open; of the folder's, no link is followed that is put there while it is looked at. Pipes do not block."""
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        if self.paths or self.folder is None:
            return os.open(Path(name).expanduser(), flags)
        folder = self.folder.resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise RequestError("only files in the folder that was opened for media are read")
        here = os.open(folder, flags)
        for step in path.relative_to(folder).parts:
            above = here
            try:
                here = os.open(step, flags | os.O_NOFOLLOW, dir_fd=above)
            finally:
                os.close(above)
        return here


def _path_of(address: str) -> str:
    """The path in a file: address: file:///absolute, file://localhost/absolute, file:from/here, and file://from/here as some write it."""
    rest = address.partition(":")[2].removeprefix("//")
    return unquote(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """What is wrong with a file's content is said with the file's name, or its address; what an address carries itself has none."""
    try:
        yield
    except RequestError as error:
        if source[:5].lower() == "data:":
            raise
        raise RequestError(f"{source[:200]}: {error}", error.field) from None


def _inline(source: str, most: int) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("a data: address must read data:TYPE;base64,..., as in data:image/png;base64,iVBORw0...")
    if len(body) > (most // 3 + 1) * _BASE64_GROUP:
        raise RequestError(f"the data: address carries more than {most:,} bytes")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the data: address is not base64: {error}") from None


@dataclass(frozen=True, kw_only=True)
class PictureReader:
    """Reads the pictures of conversations for one model. pictures: at most so many a conversation;  tokens: of all of them together."""

    rules: PixelRules
    sources: Sources = field(default_factory=Sources)
    images: ImageLimits = field(default_factory=ImageLimits)
    videos: VideoLimits = field(default_factory=VideoLimits)
    choice: FrameChoice = field(default_factory=FrameChoice)
    pictures: int = 64
    tokens: int = 131_072

    def look(self, messages: Sequence[Message | Mapping[str, Any]]) -> tuple[tuple[Message, ...], tuple[Picture, ...]]:
        """A conversation whose media know their tokens, and its pictures in order.

        Raises `RequestError` naming the part, `TokenizerError` as `as_messages`, `MissingExtra`.
        """
        checked = as_messages(messages)
        self.check_count(checked)
        seen: list[Picture] = []
        measured = tuple(
            replace(message, content=tuple(self._part(part, f"messages[{i}].content[{n}]", seen) for n, part in enumerate(message.parts)))
            if message.media
            else message
            for i, message in enumerate(checked)
        )
        return measured, tuple(seen)

    def check_count(self, messages: Sequence[Message]) -> None:
        """Raises `RequestError` when a conversation holds too many pictures."""
        if sum(len(message.media) for message in messages) > self.pictures:
            raise RequestError(f"the conversation holds more than {self.pictures} images and videos", "messages")

    def _part(self, part: Part, where: str, seen: list[Picture]) -> Part:
        if isinstance(part, Text):
            return part
        try:
            picture = self.image(part) if isinstance(part, Image) else self.video(part)
        except RequestError as error:
            raise RequestError(f"{where}: {error}", where) from None
        seen.append(picture)
        if (total := sum(picture.tokens for picture in seen)) > self.tokens:
            raise RequestError(f"{where}: the images and videos up to here take {total:,} tokens; at most {self.tokens:,}", where)
        return replace(part, tokens=picture.tokens)

    def image(self, part: Image) -> Picture:
        """An image part's picture. Raises `RequestError`."""
        rules = self.rules
        if part.detail == "low":
            rules = replace(rules, image_max=max(rules.image_min, min(rules.image_max, LOW_DETAIL * rules.factor**2)))
        data = self.sources.read(part.source, self.images.file_bytes)
        with naming(part.source):
            return read_image(data, rules, self.images)

    def video(self, part: Video) -> Picture:
        """A video part's picture. Raises `RequestError`."""
        choice = self.choice
        if part.fps is not None:
            choice = replace(choice, fps=part.fps, count=None)
        if part.frames is not None:
            choice = replace(choice, count=part.frames)
        data = self.sources.read(part.source, self.videos.file_bytes)
        with naming(part.source):
            return read_video(data, self.rules, choice, self.videos).picture


_WORDS = re.compile(r"<\|(image|video)@placeholder\|>")


def place_pictures(text: str, pictures: Sequence[Picture], tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A text whose `<|image@placeholder|>` and `<|video@placeholder|>` stand for the pictures, as ids; and where each picture begins.

    Raises `RequestError` when words and pictures do not meet, `TokenizerError` when the vocabulary has no tokens for pictures.
    """
    pieces = _WORDS.split(text)
    kinds, given = pieces[1::2], [picture.kind for picture in pictures]
    if kinds != given:
        raise RequestError(
            f"the text has places for {', '.join(kinds) or 'no picture'}, and given are {', '.join(given) or 'none'}: write "
            "<|image@placeholder|> or <|video@placeholder|> where each stands",
            "pictures",
        )
    ids, starts = list(tokenizer.encode(pieces[0])), []
    for picture, following in zip(pictures, pieces[2::2], strict=True):
        name = picture.kind.upper()
        before, here, behind = (required(tokenizer, token) for token in (f"<|{name}_START|>", PLACEHOLDER, f"<|{name}_END|>"))
        starts.append(len(ids) + 1)
        ids += [before, *[here] * picture.tokens, behind, *tokenizer.encode(following, start=False)]
    return tuple(ids), tuple(starts)
