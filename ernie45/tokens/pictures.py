"""Pictures as values: what a model is to see, how large that may be, and how many tokens it takes. No file is read for its pixels here.

Images and videos are resized so that each side is a multiple of `patch * merge` (28) and the area lies within bounds. The bounds, the
rule for thin images and the statistics are those of the ERNIE 4.5 VL processors; a folder's `preprocessor_config.json` overrides them.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ernie45.config import read_table
from ernie45.errors import CheckpointError, RequestError

THINNEST = 200
"""The largest ratio of the sides; the longer side of a thinner picture is cut down to it, as the original processor does."""

_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
FONT = "Roboto-Regular.ttf"


@dataclass(frozen=True, kw_only=True)
class PixelRules:
    """How a model wants its pixels.

    patch           side of a patch, in pixels;  merge: patches a side that become one token;  pair: frames that become one
    image_min/max   least and most pixels of a resized image;  frame_min/max: of a video frame
    mean, std       of each channel, for values from 0 to 1
    font            TrueType file for the timestamps on video frames; None takes Pillow's own
    """

    patch: int = 14
    merge: int = 2
    pair: int = 2
    image_min: int = 56 * 56
    image_max: int = 6177 * 28 * 28
    frame_min: int = 299 * 28 * 28
    frame_max: int = 1196 * 28 * 28
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    font: str | None = None

    def __post_init__(self) -> None:
        for name in ("patch", "merge", "pair", "image_min", "image_max", "frame_min", "frame_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise CheckpointError(f"{name} of the pixel rules must be a whole number of at least 1, not {value!r:.60}")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if len(numbers) != 3 or any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers):
                raise CheckpointError(f"{name} of the pixel rules must be three numbers, not {numbers!r:.80}")
        if min(self.std) <= 0:
            raise CheckpointError(f"std of the pixel rules must be above 0, not {self.std}")

    @property
    def factor(self) -> int:
        """What both sides of a resized picture are multiples of."""
        return self.patch * self.merge

    def size(self, height: int, width: int, kind: Literal["image", "video"] = "image") -> tuple[int, int]:
        """Height and width a picture of this size is resized to. Raises `RequestError` when nothing fits the bounds."""
        least, most = (self.image_min, self.image_max) if kind == "image" else (self.frame_min, self.frame_max)
        return resized(height, width, self.factor, least, most)


def resized(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The size to resize to: sides are multiples of `factor`, the area is from `least` to `most` pixels, the shape is kept about.

    As the original processor: halves round to even, and a picture thinner than `THINNEST` is first taken for one that is not.
    Raises `RequestError` when no such size is found.
    """
    assert height > 0
    assert width > 0
    if max(height, width) > THINNEST * min(height, width):
        short = max(factor, round(min(height, width) / factor) * factor)
        long = THINNEST * short // factor * factor
        height, width = (long, short) if height > width else (short, long)
    high, wide = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = math.floor(height / shrink / factor) * factor, math.floor(width / shrink / factor) * factor
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    if not least <= high * wide <= most:
        raise RequestError(
            f"a picture of {width}x{height} pixels cannot be brought to between {least:,} and {most:,} pixels in steps of {factor}",
            "messages",
        )
    return high, wide


@dataclass(frozen=True)
class Picture:
    """An image or the chosen frames of a video, resized, as RGB bytes [frames, height, width, 3].

    An image has one frame, the frames of a video come in pairs.
    """

    kind: Literal["image", "video"]
    frames: int
    height: int
    width: int
    rgb: bytes = field(repr=False)
    patch: int = 14
    merge: int = 2
    pair: int = 2

    def __post_init__(self) -> None:
        assert len(self.rgb) == self.frames * self.height * self.width * 3
        assert self.height % (self.patch * self.merge) == self.width % (self.patch * self.merge) == 0
        assert self.frames == 1 if self.kind == "image" else self.frames % self.pair == 0

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, and patches down and across one frame."""
        return self.frames, self.height // self.patch, self.width // self.patch

    @property
    def tokens(self) -> int:
        """How many tokens it takes in a prompt."""
        frames, down, across = self.grid
        return (1 if self.kind == "image" else frames // self.pair) * down * across // self.merge**2

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over kind, size and bytes: equal digests mean equal pictures."""
        head = f"{self.kind} {self.frames} {self.height} {self.width} {self.patch} {self.merge} {self.pair}\0".encode()
        return hashlib.sha256(head + self.rgb).digest()


def read_pixel_rules(folder: Path, usual: PixelRules | None = None) -> PixelRules:
    """The rules of a model folder, from its processor's files where it has them; `usual` or the released models' rules where not.

    Raises `CheckpointError` when a file is damaged or asks for what is not done here.
    """
    rules = replace(usual or PixelRules(), font=str(folder / FONT) if (folder / FONT).is_file() else None)
    for name in _FILES:
        if not (folder / name).is_file():
            continue
        data = read_table(folder / name)
        images, videos = data.get("image_processor", data), data.get("video_processor", {})
        if name.startswith("video"):
            images, videos = {}, data
        try:
            rules = replace(rules, **_settings(images, "image"), **_settings(videos, "frame"))
        except CheckpointError as error:
            raise CheckpointError(f"{folder / name}: {error}") from None
    return rules


def _settings(data: object, kind: Literal["image", "frame"]) -> dict[str, Any]:
    """Fields of `PixelRules` out of a processor's settings, by all the names these have had."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"the {kind} processor's settings are no table")
    size = data["size"] if isinstance(data.get("size"), Mapping) else {}
    found = {
        f"{kind}_min": data.get("min_pixels", size.get("shortest_edge")),
        f"{kind}_max": data.get("max_pixels", size.get("longest_edge")),
    }
    if kind == "image":
        found |= {"patch": data.get("patch_size"), "merge": data.get("merge_size", data.get("spatial_conv_size"))}
        found |= {"pair": data.get("temporal_conv_size")}
        for name, stored in (("mean", data.get("image_mean")), ("std", data.get("image_std"))):
            found[name] = tuple(stored) if isinstance(stored, list) else stored
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if data.get(name, True) is not True:
            raise CheckpointError(f"{name} is {data[name]!r:.60}; only true is supported")
    known = {each.name for each in fields(PixelRules)}
    return {name: value for name, value in found.items() if name in known and value is not None}
