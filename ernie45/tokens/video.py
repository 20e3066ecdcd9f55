"""Video files of strangers -> pictures: frames chosen, decoded by PyAV in a limited process of its own, stamped with their time, resized.

A video decoder is a large body of C that reads hostile bytes. It runs in a child that may use so much processor time, memory and clock
time, cannot write more than the frames it was asked for, and is thrown away; the caller only reads numbers and pixels from it.
"""

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import IO, Any, Literal

from ernie45.errors import MissingExtra, RequestError
from ernie45.tokens.images import load_pillow
from ernie45.tokens.pictures import Picture, PixelRules

_HEAD_BYTES = 1 << 20  # of the child's answer in front of the pixels, at most


@dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """What decoding one video may take.

    file_bytes    of the file;  frames: in the file;  frame_pixels: of one frame as stored
    picture_bytes of all chosen frames, resized
    cpu_seconds, wall_seconds, memory_bytes   of the decoding process
    """

    file_bytes: int = 100 << 20
    frames: int = 100_000
    frame_pixels: int = 3840 * 2160
    picture_bytes: int = 256 << 20
    cpu_seconds: int = 60
    wall_seconds: float = 120.0
    memory_bytes: int = 2 << 30


@dataclass(frozen=True, kw_only=True)
class FrameChoice:
    """Which frames of a video are looked at. Raises `RequestError`.

    fps         frames per second of the video, between `least` and `most` frames in all
    count       so many frames instead, in disregard of fps
    take        of each of the equal parts the video is cut into, its "middle" or its "leading" frame
    timestamps  whether each frame is stamped with its time
    """

    fps: float = 2.0
    count: int | None = None
    least: int = 16
    most: int = 180
    take: Literal["middle", "leading"] = "middle"
    timestamps: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.fps, bool) or not isinstance(self.fps, int | float) or not 0 < self.fps <= 1000:
            raise RequestError(f"fps must be a number above 0 up to 1000, not {self.fps!r:.60}", "fps")
        for name in ("count", "least", "most"):
            value = getattr(self, name)
            if value is None and name == "count":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
                raise RequestError(f"{name} of frames must be a whole number from 1 to 100000, not {value!r:.60}", name)
        if self.least > self.most:
            raise RequestError(f"least is {self.least} frames, more than most, {self.most}", "least")
        if self.take not in ("middle", "leading"):
            raise RequestError(f"take must be 'middle' or 'leading', not {self.take!r:.60}", "take")

    def frames(self, total: int, duration: float) -> tuple[int, ...]:
        """Indices of the chosen frames of a video of `total` frames and `duration` seconds."""
        count = self.count if self.count is not None else min(max(int(duration * self.fps), self.least), self.most)
        return spread(total, count, self.take)


def spread(total: int, count: int, take: Literal["middle", "leading"]) -> tuple[int, ...]:
    """`count` of `total` frames (all, if there are fewer): of each of `count` equal parts, cut at whole numbers, the first or middle."""
    count = min(count, total)
    step = total / count
    edges = [int(part * step) for part in range(count)] + [total]
    if take == "leading":
        return tuple(edges[:-1])
    return tuple((first + following - 1) // 2 for first, following in pairwise(edges))


def timestamp(seconds: float) -> str:
    """What is drawn on a frame: "time: HH:MM:SS.ss"."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"time: {int(hours):02d}:{int(minutes):02d}:{rest:05.2f}"


@dataclass(frozen=True)
class Clip:
    """A video as a model sees it, and what was chosen: frames by index and time in seconds, out of `total` and `duration` seconds."""

    picture: Picture
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    total: int
    duration: float


def read_video(data: bytes, rules: PixelRules, choice: FrameChoice | None = None, limits: VideoLimits | None = None) -> Clip:
    """A video file's bytes as a clip. Raises `RequestError` that says what is wrong, `MissingExtra` without PyAV or Pillow."""
    limits, choice = limits or VideoLimits(), choice or FrameChoice()
    load_pillow()
    if find_spec("av") is None:
        raise MissingExtra("av", "vision")
    if len(data) > limits.file_bytes:
        raise _bad(f"the video file has {len(data):,} bytes; at most {limits.file_bytes:,}")
    spec = {"limits": asdict(limits), "rules": asdict(rules), "choice": asdict(choice)}
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as answer:
        file.write(data)
        file.seek(0)
        code = _run(json.dumps(spec), file, answer, limits)
        answer.seek(0)
        return _clip(answer, code, rules, limits)


def _run(spec: str, file: IO[bytes], answer: IO[bytes], limits: VideoLimits) -> int | None:
    """The child's exit code; None when it took too long."""
    command = [sys.executable, "-m", "ernie45.tokens.decode_video", spec]
    child = subprocess.Popen(command, stdin=file, stdout=answer, stderr=subprocess.DEVNULL)
    try:
        return child.wait(limits.wall_seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        child.kill()
        child.wait()


def _clip(answer: IO[bytes], code: int | None, rules: PixelRules, limits: VideoLimits) -> Clip:
    """What the child wrote, checked as a stranger's: it read hostile bytes."""
    if code is None:
        raise _bad(f"decoding the video took longer than {limits.wall_seconds:g} s, the longest it may")
    if code == -signal.SIGXCPU:
        raise _bad(f"decoding the video took more than {limits.cpu_seconds} s of processor time, the most it may")
    head = _head(answer.readline(_HEAD_BYTES))
    if isinstance(head.get("error"), str):
        raise _bad(head["error"][:500])
    try:
        frames, height, width = (int(head[name]) for name in ("frames", "height", "width"))
        if code != 0 or not 0 < frames * height * width * 3 <= limits.picture_bytes:
            raise ValueError(f"exit code {code}")
        rgb = answer.read(frames * height * width * 3)
        picture = Picture("video", frames, height, width, rgb, rules.patch, rules.merge, rules.pair)
        indices, seconds = tuple(map(int, head["indices"])), tuple(map(float, head["seconds"]))
        return Clip(picture, indices, seconds, int(head["total"]), float(head["duration"]))
    except (KeyError, TypeError, ValueError, OverflowError, AssertionError):
        raise _bad("the video decoder broke down over this file; it is damaged, or needs more memory than is allowed") from None


def _head(line: bytes) -> dict[str, Any]:
    try:
        head = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return head if isinstance(head, dict) else {}


def _bad(text: str) -> RequestError:
    return RequestError(text, "messages")
