"""Pictures in the training recipes: how a model's pictures are read, and what a data set's pictures come to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ernie45.errors import CheckpointError
from ernie45.models.load import read_config
from ernie45.models.places import tokens_of
from ernie45.models.vision_config import ModelConfig, VisionConfig
from ernie45.tokens.messages import Image
from ernie45.tokens.pictures import PixelRules, read_pixel_rules
from ernie45.train.batch import KnownPicture
from ernie45.train.sighted import Gallery, PictureConfig

_RGB = 3


def vision_of(folder: Path) -> VisionConfig | None:
    """The seeing half that a model folder's config describes, None for a text model. Raises CheckpointError."""
    return ModelConfig.from_hf(read_config(folder), str(folder / "config.json")).vision


def open_gallery(folder: Path, vision: VisionConfig | None, config: PictureConfig, shelf_mb: int = 256) -> Gallery | None:
    """What reads pictures for the model in a folder; None for a text model, and for one that does not see colours.

    Raises CheckpointError when the folder's processor cuts other patches than the tower reads.
    """
    if vision is None or vision.channels != _RGB:
        return None
    rules = read_pixel_rules(folder, PixelRules(patch=vision.patch_size, merge=vision.merge))
    if (rules.patch, rules.merge) != (vision.patch_size, vision.merge):
        raise CheckpointError(
            f"{folder}: its processor cuts patches of {rules.patch} pixels, {rules.merge} x {rules.merge} to a token; its vision tower "
            f"reads {vision.patch_size} pixels, {vision.merge} x {vision.merge}"
        )
    return Gallery(rules, vision, config, shelf_mb)


class WithPictures(Protocol):
    """An example of any method."""

    @property
    def pictures(self) -> tuple[KnownPicture, ...]:
        """Its pictures."""
        ...


def picture_facts(examples: Sequence[WithPictures], vision: VisionConfig | None, number_bytes: int) -> dict[str, str]:
    """What the pictures of examples come to, for the plan; nothing where there are none. number_bytes: of what is computed in."""
    known = [picture for example in examples for picture in example.pictures]
    if vision is None or not known:
        return {}
    patches = [t * h * w for t, h, w in (picture.grid for picture in known)]
    images = sum(isinstance(picture.part, Image) for picture in known)
    tokens = sum(tokens_of(picture.grid, vision) for picture in known)
    kept, inputs = (kept_numbers(max(patches), vision, recompute=way) * number_bytes / 1e6 for way in (False, True))
    return {
        "pictures": f"{images:,} images, {len(known) - images:,} videos: {tokens:,} tokens, {sum(patches):,} patches",
        "largest": f"{max(patches):,} patches; a tower that learns keeps about {kept:,.1f} MB for backward, {inputs:,.1f} with --recompute",
    }


def kept_numbers(patches: int, vision: VisionConfig, *, recompute: bool) -> int:
    """About how many numbers tower and resampler keep for the backward pass of so many patches, as measured (`train.recompute.measure`).

    A block keeps eleven times its width for a patch (norms, queries, keys and values before and after they turn, results) and three times
    the inner width; the resampler ten times the tower's width. Computed again, a block keeps its input alone, and one at a time the rest.
    """
    block, resampler = 11 * vision.size + 3 * vision.ffn_size, 10 * vision.size
    if recompute:
        return patches * ((vision.depth + 1) * vision.size + max(block, resampler))
    return patches * (vision.depth * block + resampler)
