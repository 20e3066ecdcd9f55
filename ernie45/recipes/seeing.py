"""Pictures in the training recipes: how a model's pictures are read, and what a data set's pictures come to."""

from collections.abc import Sequence
from pathlib import Path

from ernie45.errors import CheckpointError
from ernie45.models.load import read_config
from ernie45.models.vision_config import ModelConfig, VisionConfig
from ernie45.tokens.messages import Image
from ernie45.tokens.pictures import PixelRules, read_pixel_rules
from ernie45.train.batch import Example
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


def picture_facts(examples: Sequence[Example], vision: VisionConfig | None) -> dict[str, str]:
    """What the pictures of examples come to, for the plan; nothing where there are none."""
    known = [picture for example in examples for picture in example.pictures]
    if vision is None or not known:
        return {}
    patches = [t * h * w for t, h, w in (picture.grid for picture in known)]
    images = sum(isinstance(picture.part, Image) for picture in known)
    tokens = sum(sum(id in vision.placeholder_ids for id in example.ids) for example in examples)
    largest = max(patches)
    tower = largest * vision.size * 4 * vision.depth
    return {
        "pictures": f"{images:,} images, {len(known) - images:,} videos: {tokens:,} tokens, {sum(patches):,} patches",
        "largest": f"{largest:,} patches, {largest * vision.patch_values * 4 / 1e6:.1f} MB of pixels; "
        f"what its tower keeps for backward takes at least {tower / 1e6:,.1f} MB, its inputs alone with --recompute",
    }
