"""Images and videos in requests, read within the server's limits: from the request itself, and from where the server was told to look."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ernie45.server.failures import bad
from ernie45.server.settings import Limits
from ernie45.tokens.images import ImageLimits
from ernie45.tokens.messages import Message, Text, as_messages
from ernie45.tokens.pictures import Picture, PixelRules
from ernie45.tokens.sight import PictureReader, Sources
from ernie45.tokens.video import VideoLimits

PARTS = ("image_url", "image", "video_url", "video")
"""Types of the parts of a message that are seen."""

_VIDEO_SECONDS = 25  # of the time a request has to be made ready


class Seeing:
    """How the pictures of one served model are read. `limits` are the server's; folder: whose files may be named, None = no files."""

    def __init__(self, rules: PixelRules, limits: Limits, folder: Path | None = None) -> None:
        self._sight = PictureReader(
            rules=rules,
            images=ImageLimits(file_bytes=limits.images_bytes, pixels=limits.image_pixels),
            videos=VideoLimits(file_bytes=limits.images_bytes, cpu_seconds=_VIDEO_SECONDS, wall_seconds=_VIDEO_SECONDS),
            pictures=limits.images,
            sources=Sources(folder=folder),
        )

    def look(
        self, messages: Sequence[Mapping[str, Any]], fetched: Mapping[str, bytes] | None = None
    ) -> tuple[tuple[Message, ...], tuple[Picture, ...]]:
        """Messages whose pictures know their tokens, and the pictures. fetched: what stood behind addresses of other machines.

        Raises `RequestError` and `TokenizerError` naming the part.
        """
        sight = self._sight
        if fetched:
            sight = replace(sight, sources=replace(sight.sources, fetch=lambda address, most: fetched[address]))
        return sight.look(messages)

    def remote(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Addresses of other machines in messages, each with the part that names it first. Raises as `look`."""
        checked = as_messages(messages)
        self._sight.check_count(checked)
        found: dict[str, str] = {}
        for i, message in enumerate(checked):
            for n, part in enumerate(message.parts):
                if not isinstance(part, Text) and part.source.partition(":")[0].lower() in ("http", "https"):
                    found.setdefault(part.source, f"messages[{i}].content[{n}]")
        return found


def has_pictures(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a part of any message is an image or a video."""
    return any(isinstance(part, Mapping) and part.get("type") in PARTS for m in messages for part in _parts(m))


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def refuse_pictures(kind: object, where: str) -> Exception:
    """For a model without eyes."""
    return bad(f"{where}: this model reads text only, not {str(kind)[:40]!r}", where, "unsupported_content")
