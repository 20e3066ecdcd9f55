"""Which vision experts the tokens of a picture go to, layer by layer: computed with a loaded model, drawn as small maps in colour.

Letters: R seen rows of a pass, C chosen experts of each.
"""

import colorsys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ernie45.errors import ConfigError
from ernie45.models.text import Decoder
from ernie45.nn.moe import MixtureOfExperts
from ernie45.ops import Routing
from ernie45.recipes.patch_map import Seen
from ernie45.tokens.images import load_pillow
from ernie45.tokens.patches import patches
from ernie45.tokens.pictures import PixelRules

if TYPE_CHECKING:
    from PIL import Image

_CELL, _GAP, _ACROSS = 10, 26, 4  # pixels of a token and between maps; maps in a row


def experts_of(decoder: Decoder, seen: Seen, rules: PixelRules) -> dict[int, list[int]]:
    """For each expert layer the first choice of every token of the picture, row by row, when the picture is all there is.

    Raises `ConfigError` for a model that does not see.
    """
    if decoder.sight is None:
        raise ConfigError("--experts needs a model that sees")
    config, picture = decoder.sight.config, seen.picture
    chosen: dict[int, list[int]] = {}

    def keep(layer: int) -> Callable[[nn.Module, object, Routing], None]:
        def hook(module: nn.Module, inputs: object, routing: Routing) -> None:
            chosen[layer] = routing.experts[1:-1, 0].tolist()  # without the markers around the picture

        return hook

    banks = [(n, block.ffn) for n, block in enumerate(decoder.layers) if isinstance(block.ffn, MixtureOfExperts)]
    hooks = [ffn.vision.router.register_forward_hook(keep(n)) for n, ffn in banks if ffn.vision is not None]
    pixels: Tensor = torch.from_numpy(patches(picture, rules))
    try:
        tokens = [config.image_start_id, *[config.image_id] * picture.tokens, config.image_end_id]
        decoder.prompt_logits(tokens, [(pixels, picture.grid)])
    finally:
        for hook in hooks:
            hook.remove()
    return chosen


def draw_experts(seen: Seen, chosen: dict[int, list[int]], count: int) -> "Image.Image":
    """One small map a layer; each of `count` experts has a colour of its own."""
    from PIL import ImageDraw, ImageFont

    width, height = seen.columns * _CELL, seen.rows * _CELL
    rows = -(-len(chosen) // _ACROSS)
    sheet = load_pillow().new("RGB", (40 + _ACROSS * (max(width, 150) + _GAP), 20 + rows * (height + 2 * _GAP)), (250, 250, 248))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for n, (layer, experts) in enumerate(chosen.items()):
        left, top = 40 + n % _ACROSS * (max(width, 150) + _GAP), 20 + n // _ACROSS * (height + 2 * _GAP)
        draw.text((left, top), f"layer {layer}: {len(set(experts))} of {count} experts", (20, 24, 32), font)
        for place, expert in enumerate(experts):
            x, y = left + place % seen.columns * _CELL, top + 20 + place // seen.columns * _CELL
            draw.rectangle((x, y, x + _CELL - 1, y + _CELL - 1), colour(expert, count))
    return sheet


def stacked(above: "Image.Image", below: "Image.Image") -> "Image.Image":
    """Two drawings as one."""
    both = load_pillow().new("RGB", (max(above.width, below.width), above.height + below.height), (250, 250, 248))
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    return both


def colour(expert: int, count: int) -> tuple[int, int, int]:
    """Hues around the circle, neighbours in two shades."""
    red, green, blue = colorsys.hsv_to_rgb(expert / count, 0.75, 0.95 if expert % 2 else 0.65)
    return int(red * 255), int(green * 255), int(blue * 255)
