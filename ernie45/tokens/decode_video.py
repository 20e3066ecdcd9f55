"""The process that decodes one video: `python -m ernie45.tokens.decode_video SPEC`, the file on its input, the frames on its output.

It limits itself before it looks at a byte. Containers are a list and are named to the decoder by their first bytes: playlists and the
like, which would open other files, are never tried. The answer is one line of JSON, then RGB bytes.
"""

import contextlib
import io
import json
import resource
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import IO, TYPE_CHECKING, Any

from ernie45.config import from_mapping
from ernie45.errors import ErnieError, RequestError
from ernie45.tokens.images import load_pillow, resize
from ernie45.tokens.pictures import PixelRules
from ernie45.tokens.video import FrameChoice, VideoLimits, timestamp

if TYPE_CHECKING:
    from PIL import Image

_STAMP = 0.1  # of the shorter side is the height of the timestamp, and of that height the width of its rim


def container(head: bytes) -> str | None:
    """The demuxer for a file that begins so; None for what is not decoded here."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return "gif" if head[:6] in (b"GIF87a", b"GIF89a") else None


@dataclass(frozen=True)
class Index:
    """What a pass over the packets tells without decoding: times of the frames in the order shown, in the stream's unit, and keys.

    keys are the times of frames that stand alone, where decoding can begin; rate is frames a second.
    """

    rate: Fraction
    times: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """In seconds: frames by rate, as the timestamps are reckoned."""
        return float(len(self.times) / self.rate)


def scan(file: IO[bytes], format: str, limits: VideoLimits) -> Index:
    """Counts the frames. Raises `RequestError` for a file without video or with too much of it."""
    with _opened(file, format) as container_:
        stream = _video_stream(container_)
        if stream.width * stream.height > limits.frame_pixels:
            raise _bad(f"the video's frames have {stream.width}x{stream.height} pixels; at most {limits.frame_pixels:,}")
        index = Index(Fraction(stream.average_rate or stream.base_rate or 24))
        for packet in container_.demux(stream):
            time = packet.pts if packet.pts is not None else packet.dts
            if not packet.size or time is None or packet.is_discard:
                continue
            index.times.append(time)
            if packet.is_keyframe:
                index.keys.append(time)
            if len(index.times) > limits.frames:
                raise _bad(f"the video has more than {limits.frames:,} frames")
    if not index.times or index.rate <= 0:
        raise _bad("the file holds no video frames")
    index.times.sort()
    index.keys.sort()
    return index


def decode(file: IO[bytes], format: str, index: Index, wanted: tuple[int, ...]) -> Iterator["Image.Image"]:
    """The wanted frames (rising indices) as RGB images. Stretches between them are jumped over where a frame in them stands alone.

    A frame that cannot be decoded is taken from where decoding goes on; at the end of a file that was cut, its last frame.
    """
    with _opened(file, format) as container_:
        stream = _video_stream(container_)
        frames = container_.decode(stream)
        last: Any = None
        for number in wanted:
            target = index.times[number]
            key = bisect_right(index.keys, target)
            if key and (last is None or last.pts is None or last.pts < index.keys[key - 1]) and index.keys[key - 1] > index.times[0]:
                container_.seek(index.keys[key - 1], stream=stream)
                frames = container_.decode(stream)
            while last is None or last.pts is None or last.pts < target:
                following = next(frames, None)
                if following is None:
                    break
                last = following
            if last is None:
                raise _bad("no frame of the video can be decoded")
            yield _rgb(last)


def _rgb(frame: Any) -> "Image.Image":
    """A frame as an image, turned as the file says."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def stamp(image: "Image.Image", seconds: float, font_file: str | None) -> None:
    """Draws the time at the upper left: black with a white rim."""
    from PIL import ImageDraw, ImageFont

    height = int(min(image.size) * _STAMP)
    if height < 1:
        return
    font = ImageFont.truetype(font_file, height) if font_file else ImageFont.load_default(height)
    rim = int(height * _STAMP)
    ImageDraw.Draw(image).text((0, 0), timestamp(seconds), (0, 0, 0), font, stroke_width=rim, stroke_fill=(255, 255, 255))


def answer(file: IO[bytes], out: IO[bytes], limits: VideoLimits, rules: PixelRules, choice: FrameChoice) -> None:
    """Writes the chosen frames. Raises `RequestError`."""
    head = file.read(16)
    format = container(head)
    if format is None:
        raise _bad("this is no video of a known container (MP4, MOV, WebM, Matroska, AVI, GIF)")
    index = scan(file, format, limits)
    wanted = choice.frames(len(index.times), index.duration)
    seconds = [number * index.duration / len(index.times) for number in wanted]
    padding = -len(wanted) % rules.pair
    size: tuple[int, int] | None = None
    last = b""
    for image, second in zip(decode(file, format, index, wanted), seconds, strict=True):
        if size is None:
            size = rules.size(image.height, image.width, "video")
            frames = len(wanted) + padding
            if frames * size[0] * size[1] * 3 > limits.picture_bytes:
                raise _bad(
                    f"{frames} frames of {size[1]}x{size[0]} pixels are {frames * size[0] * size[1] * 3:,} bytes; at most "
                    f"{limits.picture_bytes:,}: choose fewer frames"
                )
            told = {"frames": frames, "height": size[0], "width": size[1], "indices": wanted, "seconds": seconds}
            out.write(json.dumps(told | {"total": len(index.times), "duration": index.duration}).encode() + b"\n")
        if choice.timestamps:
            stamp(image, second, rules.font)
        last = resize(image, *size)
        out.write(last)
    out.write(last * padding)


@contextlib.contextmanager
def _opened(file: IO[bytes], format: str) -> Iterator[Any]:
    import av

    file.seek(0)
    try:
        # The list of protocols is for what a file refers to: it may refer to nothing.
        with av.open(file, format=format, options={"protocol_whitelist": ""}) as opened:
            yield opened
    except av.FFmpegError as error:
        raise _bad(f"the video file is damaged: {error.strerror or error}") from None


def _video_stream(opened: Any) -> Any:
    if not opened.streams.video:
        raise _bad("the file holds no video")
    stream = opened.streams.video[0]
    if stream.codec_context is None:
        raise _bad("the file's video is of a kind that cannot be decoded here")
    stream.codec_context.thread_count = 1  # each thread would hold frames of its own
    return stream


def limit_process(limits: VideoLimits) -> None:
    """From here on this process can do no more than it must. What it writes is the frames and one line."""
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.picture_bytes + (1 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(spec: dict[str, Any]) -> None:
    """Decodes standard input onto standard output, as the spec says."""
    limits = from_mapping(VideoLimits, spec["limits"], "limits")
    limit_process(limits)
    load_pillow()
    out = io.BufferedWriter(io.FileIO(1, "wb", closefd=False))
    try:
        rules, choice = from_mapping(PixelRules, spec["rules"], "rules"), from_mapping(FrameChoice, spec["choice"], "choice")
        answer(io.BufferedRandom(io.FileIO(0, "rb+", closefd=False)), out, limits, rules, choice)
    except (ErnieError, MemoryError) as error:
        text = str(error) or f"decoding the video needs more than {limits.memory_bytes:,} bytes of memory"
        out.write(json.dumps({"error": text}).encode() + b"\n")
    out.flush()


def _bad(text: str) -> RequestError:
    return RequestError(text, "messages")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
