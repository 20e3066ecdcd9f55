"""Drawings of things and flags out of the packages, as pictures with a transparent ground; and forms of our own."""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from ernie45.errors import DataError, MissingExtra
from story.packages import read_icons
from story.words import COLOURS, COUNTRIES, KEPT_COUNTRIES, THINGS

THING_STYLES = ("noto", "noto-v1", "fluent", "emojione")
FLAG_STYLES = ("flag", "flagpack", "cif")
EXAM_STYLE = "twemoji"
"""Drawn by other hands: no picture of the training is in this style."""
_PIXELS = 128
_LEAST_SHARE = 0.04  # of a flag's area that a colour has
_FLAG_COLOURS = {name: COLOURS[name] for name in ("red", "orange", "yellow", "green", "blue", "black", "white")} | {
    "light blue": (110, 180, 230),
    "dark blue": (10, 30, 110),
    "dark red": (150, 20, 40),
    "dark green": (0, 95, 60),
    "gold": (255, 200, 40),
}


class Drawings:
    """Every drawing by style and name. Rendered once each, when it is first asked for."""

    def __init__(self, folders: dict[str, Path]) -> None:
        """folders: of the packages, by our names for them. Raises DataError when a drawing is missing."""
        self._sets = {style: read_icons(folders[style]) for style in (*THING_STYLES, *FLAG_STYLES, EXAM_STYLE)}
        self.thing = lru_cache(maxsize=None)(self._thing)
        self.flag = lru_cache(maxsize=None)(self._flag)
        self.flag_colours = lru_cache(maxsize=None)(self._flag_colours)

    def _thing(self, style: str, name: str) -> Image.Image:
        """A thing, RGBA, cut to what is drawn."""
        return self._rendered(style, THINGS[name][0])

    def _flag(self, style: str, code: str) -> Image.Image:
        """A country's flag, RGBA."""
        if style == EXAM_STYLE:
            country = (COUNTRIES | KEPT_COUNTRIES)[code].removeprefix("the ")
            return self._rendered(style, f"flag-{country.lower().replace(' ', '-')}")
        return self._rendered(style, f"{code}-4x3" if style == "flag" else code)

    def _flag_colours(self, code: str) -> list[str]:
        """The names of a flag's colours, the largest area first, measured on the plainest drawing."""
        drawn = self._flag("flag", code)
        flag = Image.new("RGB", drawn.size, "white")
        flag.paste(drawn, mask=drawn)
        flag = flag.resize((48, 36), Image.Resampling.NEAREST)
        counts: dict[str, int] = {}
        for pixel in zip(*[iter(flag.tobytes())] * 3, strict=True):
            name = min(_FLAG_COLOURS, key=lambda n: math.dist(_FLAG_COLOURS[n], pixel))
            plain = name.removeprefix("dark ").removeprefix("light ") if name != "gold" else "yellow"
            counts[plain] = counts.get(plain, 0) + 1
        return [name for name, n in sorted(counts.items(), key=lambda item: -item[1]) if n >= _LEAST_SHARE * 48 * 36]

    def _rendered(self, style: str, name: str) -> Image.Image:
        icons = self._sets[style]
        icon = icons["icons"].get(name) or icons["icons"].get(icons.get("aliases", {}).get(name, {}).get("parent"))
        if icon is None:
            raise DataError(f"the drawings '{style}' have none of the name '{name}'; was the package changed?")
        wide, high = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {wide} {high}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
        drawn = Image.open(io.BytesIO(render_svg(svg, _PIXELS))).convert("RGBA")
        inside = drawn.getbbox()
        assert inside is not None, f"{style} {name} is empty"
        return drawn.crop(inside)


def render_svg(svg: str, width: int) -> bytes:
    """An SVG as PNG. Raises MissingExtra without the renderer."""
    try:
        from resvg_py import svg_to_bytes
    except ModuleNotFoundError:
        raise MissingExtra("resvg-py", "story") from None
    return bytes(svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True))


def form(name: str, rgb: Sequence[int], size: int, turn: float) -> Image.Image:
    """One of our own forms, RGBA, `size` pixels wide before it is turned by `turn` degrees."""
    side = 4 * size
    made = Image.new("RGBA", (side, side))
    draw, colour = ImageDraw.Draw(made), (*rgb, 255)
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=colour)
        if name == "ring":
            edge = side * 0.26
            draw.ellipse((edge, edge, side - edge, side - edge), fill=(0, 0, 0, 0))
    elif name == "square":
        edge = side * 0.08
        draw.rectangle((edge, edge, side - edge, side - edge), fill=colour)
    elif name == "cross":
        arm = side * 0.34
        draw.rectangle((arm, 0, side - arm, side), fill=colour)
        draw.rectangle((0, arm, side, side - arm), fill=colour)
    else:
        corners = 3 if name == "triangle" else 10
        radii = [0.5] if name == "triangle" else [0.5, 0.21]
        points = [
            (side / 2 + side * r * math.sin(a), side * (0.56 if corners == 3 else 0.5) - side * r * math.cos(a))
            for i in range(corners)
            for r, a in [(radii[i % len(radii)], 2 * math.pi * i / corners)]
        ]
        draw.polygon(points, fill=colour)
    rimmed = ImageOps.expand(made.resize((size - 2, size - 2), Image.Resampling.LANCZOS), 1)
    return rimmed.rotate(turn, Image.Resampling.BICUBIC, expand=True)
