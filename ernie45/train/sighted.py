"""Training rows with pictures: read once when the data is, known by a digest, and read again when a batch needs their pixels.

A data set's pictures do not fit in memory, so an example keeps only where each picture comes from, its grid and its digest. A batch reads
them anew, through a shelf that keeps the last ones; a file that has changed since ends the run by name.
Letters: T tokens, S patches, C numbers of one patch.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ernie45.errors import ConfigError, DataError, ErnieError
from ernie45.models.places import Places, is_vision, place
from ernie45.models.vision_config import VisionConfig
from ernie45.tokens.messages import Image, Message, Part, Video
from ernie45.tokens.patches import patches
from ernie45.tokens.pictures import Picture, PixelRules
from ernie45.tokens.sight import PictureReader, Sources
from ernie45.tokens.video import FrameChoice
from ernie45.train.batch import Example, KnownPicture, Seen, TrainBatch, pack

_USUAL = FrameChoice()


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How the pictures of training rows are read."""

    min_pixels: int | None = None
    """Least pixels of an image after resizing; by default as the model's processor has it."""
    max_pixels: int | None = None
    """Most pixels of an image after resizing: 784 are one token."""
    video_min_pixels: int | None = None
    """As `min_pixels`, of one frame of a video."""
    video_max_pixels: int | None = None
    """As `max_pixels`, of one frame of a video."""
    fps: float = _USUAL.fps
    """Frames a second that are taken of a video, between `min_frames` and `max_frames` in all."""
    min_frames: int = _USUAL.least
    """Least frames of a video."""
    max_frames: int = _USUAL.most
    """Most frames of a video."""
    timestamps: bool = True
    """Stamp each frame of a video with its time, as serving does."""
    most: int = 64
    """Most pictures of one row."""

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "min_frames", "max_frames", "most"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"pictures.{name} must be at least 1, not {value}")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"pictures.fps must be a number above 0, not {self.fps}")
        for least, most in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels"), ("min_frames", "max_frames")):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                raise ConfigError(f"pictures.{least} is {low}, more than pictures.{most}, {high}")

    def rules(self, usual: PixelRules) -> PixelRules:
        """The model's rules with what is set here in place of its own."""
        return replace(
            usual,
            image_min=usual.image_min if self.min_pixels is None else self.min_pixels,
            image_max=usual.image_max if self.max_pixels is None else self.max_pixels,
            frame_min=usual.frame_min if self.video_min_pixels is None else self.video_min_pixels,
            frame_max=usual.frame_max if self.video_max_pixels is None else self.video_max_pixels,
        )


class Gallery:
    """The pictures of a data set, for one model: `look` when rows are read, `pack` when they are learned from."""

    def __init__(self, rules: PixelRules, vision: VisionConfig, config: PictureConfig | None = None, shelf_mb: int = 256) -> None:
        """rules: the model's; vision: of the model that learns. shelf_mb: megabytes of pictures that are kept between batches."""
        config = config or PictureConfig()
        choice = FrameChoice(fps=config.fps, least=config.min_frames, most=config.max_frames, timestamps=config.timestamps)
        self.rules, self.vision = config.rules(rules), vision
        # the files are the caller's own: any path may be read
        self._reader = PictureReader(rules=self.rules, sources=Sources(paths=True), choice=choice, pictures=config.most)
        self._shelf: OrderedDict[bytes, Picture] = OrderedDict()  # used last stands last
        self._room, self._held = shelf_mb << 20, 0

    def look(self, messages: Sequence[Message], where: str) -> tuple[tuple[Message, ...], tuple[KnownPicture, ...]]:
        """Messages whose media know their tokens, and their pictures. Raises DataError naming the row and the part."""
        try:
            measured, pictures = self._reader.look(messages)
        except ErnieError as error:
            raise DataError(f"{where}: {error}") from None
        parts = [part for message in messages for part in message.media]
        return measured, tuple(self._known(part, picture, where) for part, picture in zip(parts, pictures, strict=True))

    def look_at(self, parts: Sequence[Part], where: str) -> tuple[tuple[Part, ...], tuple[KnownPicture, ...]]:
        """As `look`, for the parts of a text with pictures in it."""
        (message,), known = self.look([Message("user", tuple(parts))], where)
        return message.parts, known

    def _known(self, part: Image | Video, picture: Picture, where: str) -> KnownPicture:
        self._put(picture)
        return KnownPicture(part, picture.grid, picture.digest, where)

    def picture(self, known: KnownPicture) -> Picture:
        """The pixels. Raises DataError when the file is gone or is another one now."""
        held = self._shelf.get(known.digest)
        if held is not None:
            self._shelf.move_to_end(known.digest)
            return held
        try:
            part = known.part
            picture = self._reader.image(part) if isinstance(part, Image) else self._reader.video(part)
        except ErnieError as error:
            raise DataError(f"{known.where}: a picture that could be read before cannot be read now: {error}") from None
        if picture.digest != known.digest:
            raise DataError(f"{known.where}: {part.source[:80]} is another picture than when the data was read; start a new run")
        self._put(picture)
        return picture

    def _put(self, picture: Picture) -> None:
        if picture.digest not in self._shelf:
            self._shelf[picture.digest] = picture
            self._held += len(picture.rgb)
        while self._held > self._room:
            _, oldest = self._shelf.popitem(last=False)
            self._held -= len(oldest.rgb)

    def pack(self, examples: Sequence[Example]) -> TrainBatch:
        """As `batch.pack`, with the pictures of the examples; each document's pictures are seen by that document alone."""
        batch = pack(examples)
        known = [picture for example in examples for picture in example.pictures]
        if not known:
            return batch
        positions_T3 = torch.cat([self.places(e.ids, e.pictures).positions_T3 for e in examples])
        return replace(batch, positions_T=positions_T3, seen=self.see(batch.tokens_T, known))

    def places(self, ids: Sequence[int], known: Sequence[KnownPicture]) -> Places:
        """Where the tokens of one document stand."""
        return place(ids, [picture.grid for picture in known], self.vision)

    def see(self, tokens_T: Tensor, known: Sequence[KnownPicture]) -> Seen:
        """The pictures of a batch, in the order of their placeholders."""
        pixels = np.concatenate([patches(self.picture(one), self.rules) for one in known])
        digest = hashlib.sha256(b"".join(one.digest for one in known)).digest()
        return Seen(torch.from_numpy(pixels), tuple(one.grid for one in known), is_vision(tokens_T, self.vision), digest)
