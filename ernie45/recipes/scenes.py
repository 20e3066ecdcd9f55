"""Pictures to calibrate with: a folder of images, or conversations about images, as sequences of one length.

Behind each picture stands text of the calibration text, so that every sequence is full. Pictures are made small enough for their sequence.
Letters: L tokens of a sequence, S patches, C numbers of one patch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ernie45.errors import ConfigError, ErnieError
from ernie45.models.load import OpenModel
from ernie45.models.places import is_vision, place
from ernie45.models.vision_config import VisionConfig
from ernie45.quant.convert import Scene
from ernie45.tokens.patches import patches
from ernie45.tokens.pictures import Picture, PixelRules, read_pixel_rules
from ernie45.tokens.sight import PictureReader, Sources, place_pictures
from ernie45.tokens.template import load_template
from ernie45.tokens.tokenizer import Tokenizer

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
_SHARE = 0.75  # of a sequence that one picture may take

Row = tuple[Sequence[int], Sequence[Picture]]
"""Ids, and the pictures that their placeholders stand for."""


def read_scenes(path: Path, opened: OpenModel, tokenizer: Tokenizer, window: int, filling: Sequence[Sequence[int]]) -> list[Scene]:
    """The sequences of `window` tokens; `filling` are windows of text, taken in turn.

    `path` is a folder of image files, in the order of their names, or a file of conversations, a JSON object with `messages` a line, whose
    image parts name files from the file's own folder on. Raises `ConfigError` that names the file or line when it cannot be read, holds no
    picture, or does not fit the window, and when the model does not see.
    """
    vision = opened.vision
    if vision is None:
        raise ConfigError(f"--pictures is for models that see, and {opened.path.name} does not")
    rules = read_pixel_rules(opened.path, PixelRules(patch=vision.patch_size, merge=vision.merge))
    rules = replace(rules, image_max=max(rules.image_min, min(rules.image_max, int(window * _SHARE) * rules.factor**2)))
    rows = _of_folder(path, tokenizer, rules) if path.is_dir() else _of_file(path, opened.path, tokenizer, rules)
    scenes = []
    for number, (where, (ids, pictures)) in enumerate(rows):
        if not pictures:
            raise ConfigError(f"{where} holds no picture; text belongs into --calibration")
        if len(ids) > window:
            raise ConfigError(
                f"{where} takes {len(ids):,} tokens; sequences have {window:,}: ask for a longer --window, or show fewer pictures"
            )
        filled = [*ids, *filling[number % len(filling)][: window - len(ids)]]
        scenes.append(_scene(filled, pictures, vision, rules))
    if not scenes:
        raise ConfigError(f"{path} holds no image file ({', '.join(sorted(_SUFFIXES))})")
    return scenes


def _scene(ids: Sequence[int], pictures: Sequence[Picture], vision: VisionConfig, rules: PixelRules) -> Scene:
    grids = tuple(picture.grid for picture in pictures)
    tokens_L = torch.tensor(ids)
    patches_SC = torch.cat([torch.from_numpy(patches(picture, rules)) for picture in pictures])
    return Scene(tokens_L, patches_SC, grids, place(ids, grids, vision).positions_T3, is_vision(tokens_L, vision))


def _of_folder(folder: Path, tokenizer: Tokenizer, rules: PixelRules) -> Iterator[tuple[str, Row]]:
    reader = PictureReader(rules=rules, sources=Sources(paths=True))
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES):
        try:
            _, pictures = reader.look([_shown(file)])
            yield str(file), (place_pictures("User: Picture 1:<|image@placeholder|>", pictures, tokenizer)[0], pictures)
        except ErnieError as error:
            raise ConfigError(f"{file}: {error}") from None


def _shown(file: Path) -> Mapping[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(file)}}]}


def _of_file(path: Path, model: Path, tokenizer: Tokenizer, rules: PixelRules) -> Iterator[tuple[str, Row]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    template = load_template(model, tokenizer)
    reader = PictureReader(rules=rules, sources=Sources(folder=path.parent))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            messages, pictures = reader.look(_from_here(record["messages"]))
            yield where, (template.render(messages, add_generation_prompt=False).ids, pictures)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"{where} is no JSON object with a list of messages") from None
        except ErnieError as error:
            raise ConfigError(f"{where}: {error}") from None


def _from_here(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with bare paths as file: addresses, which are read from the file's folder alone."""
    return [{**message, "content": _parts(message["content"])} for message in messages]


def _parts(content: Any) -> Any:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = part["type"]
    if kind not in ("image", "image_url"):
        return part
    given = part.get(kind, part.get("source"))
    address = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(address, str) or ":" in address:
        return part
    return {"type": "image_url", "image_url": {"url": f"file:{address}"}}
