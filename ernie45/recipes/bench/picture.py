"""A load run as a PNG: how each kind of wait is distributed, and what the server wrote second by second."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ernie45.errors import ConfigError
from ernie45.recipes.bench.figures import KINDS, percentile, values_of
from ernie45.recipes.bench.load import Sample

_WIDTH, _HEIGHT, _EDGE = 640, 360, 64
_INK, _FAINT, _LINE, _MARK = "#1b1f24", "#c9d1d9", "#0b61a4", "#b4472e"
Point = tuple[float, float]


def draw(samples: Sequence[Sample], title: str, path: Path) -> None:
    """Write the picture. Raises `ConfigError` when it cannot be written."""
    sheet = Image.new("RGB", (2 * _WIDTH, 2 * _HEIGHT + 48), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_EDGE, 16), title, fill=_INK, font=ImageFont.load_default(20))
    for place, kind in enumerate(("ttft", "tpot", "e2e")):
        values = values_of(samples, kind)
        points = [(value, 100 * (i + 1) / len(values)) for i, value in enumerate(values)]
        marks = [(percentile(values, share), f"p{share}") for share in (50, 99)] if values else []
        _panel(pen, _corner(place), f"{KINDS[kind]}, ms", "% of requests", points, marks, top=100.0)
    _panel(pen, _corner(3), "seconds since the start", "tokens/s written", _rate(samples), [])
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"--picture {path} cannot be written: {error.strerror or error}") from None


def _corner(place: int) -> tuple[int, int]:
    return place % 2 * _WIDTH, 48 + place // 2 * _HEIGHT


def _rate(samples: Sequence[Sample]) -> list[Point]:
    """Tokens written in each of up to 100 equal spans; a piece of text stands for its share of its answer's tokens."""
    pieces = [(time, s.output_tokens / len(s.pieces)) for s in samples for time in s.pieces]
    if not pieces:
        return []
    end = max(time for time, _ in pieces) or 1.0
    spans = max(20, min(100, int(end)))
    sums = [0.0] * spans
    for time, tokens in pieces:
        sums[min(spans - 1, int(time / end * spans))] += tokens
    return [((i + 0.5) * end / spans, total * spans / end) for i, total in enumerate(sums)]


def _panel(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    across: str,
    up: str,
    points: Sequence[Point],
    marks: Sequence[tuple[float, str]],
    top: float | None = None,
) -> None:
    """One diagram with its axes; `marks` are upright lines with a name."""
    small = ImageFont.load_default(13)
    left, right = corner[0] + _EDGE, corner[0] + _WIDTH - 32
    high, low = corner[1] + 28, corner[1] + _HEIGHT - 56
    widest, tallest = max((x for x, _ in points), default=1.0) or 1.0, top or max((y for _, y in points), default=1.0) or 1.0

    def at(x: float, y: float) -> Point:
        return left + (right - left) * x / widest, low - (low - high) * y / tallest

    for i in range(5):
        x, y = at(widest * i / 4, tallest * i / 4)
        pen.line((left, y, right, y), fill=_FAINT)
        pen.text((left - 8, y), f"{tallest * i / 4:.3g}", fill=_INK, font=small, anchor="rm")
        pen.text((x, low + 8), f"{widest * i / 4:.3g}", fill=_INK, font=small, anchor="mt")
    pen.text(((left + right) / 2, low + 32), across, fill=_INK, font=small, anchor="mt")
    pen.text((left, high - 8), up, fill=_INK, font=small, anchor="lb")
    for value, name in marks:
        x, _ = at(value, 0)
        pen.line((x, high, x, low), fill=_MARK)
        side, anchor = (-4, "rt") if x > right - 60 else (4, "lt")
        pen.text((x + side, high + 12), f"{name} {value:.4g}", fill=_MARK, font=small, anchor=anchor)
    if len(points) > 1:
        pen.line([at(x, y) for x, y in points], fill=_LINE, width=2, joint="curve")
    else:
        for x, y in (at(x, y) for x, y in points):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_LINE)
