"""Our patches, grids and chosen frames beside those of transformers' own processors, as `processor_values.py` wrote them down."""

import json

import numpy as np
import pytest
from PIL import Image

from ernie45.tokens.images import resize
from ernie45.tokens.patches import patches
from ernie45.tokens.pictures import Picture, PixelRules
from ernie45.tokens.video import FrameChoice
from tests.tokens.processor_values import FILE, FILMS, PICTURES, RATE, film, summary, wave

RULES = PixelRules()
TOLD = json.loads(FILE.read_text())
# torch's bicubic rounds its sums otherwise than Pillow's fixed-point: two steps of 255 at most, 0.0152 each once divided by the deviation
STEPS = 2 * 0.0152


def beside(ours: Picture, told: dict) -> None:
    assert list(ours.grid) == told["grid"]
    found = summary(patches(ours, RULES))
    np.testing.assert_allclose(found["values"], told["values"], rtol=0, atol=STEPS)
    np.testing.assert_allclose(found["mean"], told["mean"], rtol=0, atol=0.002)
    np.testing.assert_allclose(found["std"], told["std"], rtol=0, atol=0.002)


@pytest.mark.parametrize("name", PICTURES)
def test_images(name):
    height, width = RULES.size(*PICTURES[name])
    image = Image.fromarray(wave(*PICTURES[name]))
    beside(Picture("image", 1, height, width, resize(image, height, width)), TOLD["images"][name])


@pytest.mark.parametrize("name", FILMS)
def test_films(name):
    count, *size, asked = FILMS[name]
    told = TOLD["videos"][name]
    choice = FrameChoice(take="leading", **asked) if asked else FrameChoice(take="leading", count=min(max(count, 16), 180))
    chosen = list(choice.frames(count, count / RATE))
    assert chosen == told["chosen"]
    chosen += chosen[-1:] * (len(chosen) % 2)
    height, width = RULES.size(*size, "video")
    frames = film(count, *size)
    rgb = b"".join(resize(Image.fromarray(frames[number]), height, width) for number in chosen)
    beside(Picture("video", len(chosen), height, width, rgb), told)
