"""A picture of how a model sees a picture: the resized image with its patches, its tokens and their positions, as a PNG.

Thin lines bound patches, thick ones the blocks of patches that become one token. The rulers number rows and columns of tokens, which are
the h and w positions counted from where the image begins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie45.errors import ConfigError
from ernie45.tokens.images import ImageLimits, load_pillow, open_image, to_picture
from ernie45.tokens.pictures import Picture, PixelRules
from ernie45.tokens.sight import Sources, naming

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

_WIDEST, _SMALLEST_CELL = 1600, 22  # pixels: of the drawing, and of a token that is numbered
_MARGIN, _LINE = 40, 22
_INK, _PAPER, _FAINT = (20, 24, 32), (250, 250, 248), (110, 118, 130)
_PATCH, _TOKEN = (255, 255, 255, 90), (255, 64, 32, 220)


@dataclass(frozen=True)
class Seen:
    """An image file and the picture a model makes of it. height, width: of the file, upright."""

    name: str
    height: int
    width: int
    picture: Picture

    @property
    def rows(self) -> int:
        """Of tokens."""
        return self.picture.grid[1] // self.picture.merge

    @property
    def columns(self) -> int:
        """Of tokens."""
        return self.picture.grid[2] // self.picture.merge

    def facts(self) -> dict[str, Any]:
        """What is known of it, for programs. Sizes are (height, width) in pixels, the grid is (frames, rows, columns) of patches."""
        picture = self.picture
        return {
            "image": self.name,
            "size": (self.height, self.width),
            "resized": (picture.height, picture.width),
            "grid": picture.grid,
            "tokens": picture.tokens,
            "token_rows": self.rows,
            "token_columns": self.columns,
        }

    def lines(self) -> list[str]:
        """What is known of it, for people to read."""
        _, down, across = self.picture.grid
        picture = self.picture
        return [
            f"file       {self.name}, {self.width} x {self.height} pixels",
            f"resized    {picture.width} x {picture.height} pixels, multiples of {picture.patch * picture.merge}",
            f"patches    {down * across:,}: {down} rows of {across}, {picture.patch} x {picture.patch} pixels each",
            f"tokens     {picture.tokens:,}: {self.rows} rows of {self.columns}, {picture.merge} x {picture.merge} patches each",
            f"positions  t 0, h 0 to {self.rows - 1}, w 0 to {self.columns - 1} from where it begins; "
            f"what follows stands {max(self.rows, self.columns)} later",
        ]


def see(path: Path, rules: PixelRules) -> Seen:
    """Reads an image file as a model with these rules would. Raises `RequestError` for a file that is no image."""
    limits = ImageLimits()
    data = Sources(paths=True).read(str(path), limits.file_bytes)
    with naming(str(path)):
        image = open_image(data, limits)
    return Seen(path.name, image.height, image.width, to_picture(image, rules))


def write_map(seen: Seen, path: Path, below: "Callable[[Image.Image], Image.Image]" = lambda drawn: drawn) -> None:
    """Draws the map into a PNG file; `below` may add to it. Raises `ConfigError` when it cannot be written."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} must end in .png")
    try:
        below(draw_map(seen)).save(path, "PNG")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


def draw_map(seen: Seen) -> "Image.Image":
    """The map as an RGB image: the facts above, rulers at the left and the top, the picture with its grid."""
    from PIL import ImageDraw, ImageFont

    pillow = load_pillow()
    picture = seen.picture
    scale = max(1, min(3, _WIDEST // picture.width))
    token = picture.patch * picture.merge * scale
    width, height = picture.width * scale, picture.height * scale
    font = ImageFont.load_default(14)
    top = _LINE * len(seen.lines()) + 24 + _MARGIN
    sheet = pillow.new("RGB", (max(width + 2 * _MARGIN, 720), height + top + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, line in enumerate(seen.lines()):
        word, _, rest = line.partition(" ")
        draw.text((_MARGIN, 14 + n * _LINE), word, _FAINT, font)
        draw.text((_MARGIN + 90, 14 + n * _LINE), rest.strip(), _INK, font)
    shown = pillow.frombytes("RGB", (picture.width, picture.height), picture.rgb).resize((width, height), pillow.Resampling.NEAREST)
    over = pillow.new("RGBA", shown.size, (0, 0, 0, 0))
    _grid(ImageDraw.Draw(over), seen, scale)
    if token >= _SMALLEST_CELL + 10:
        _numbers(ImageDraw.Draw(over), seen, token, ImageFont.load_default(max(10, token // 4)))
    shown = pillow.alpha_composite(shown.convert("RGBA"), over).convert("RGB")
    sheet.paste(shown, (_MARGIN, top))
    _rulers(draw, seen, token, top, font)
    return sheet


def _grid(draw: "ImageDraw.ImageDraw", seen: Seen, scale: int) -> None:
    picture = seen.picture
    width, height, patch = picture.width * scale, picture.height * scale, picture.patch * scale
    for step, colour, thick in ((patch, _PATCH, 1), (patch * picture.merge, _TOKEN, 2 if scale > 1 else 1)):
        for x in range(0, width + 1, step):
            draw.line((min(x, width - 1), 0, min(x, width - 1), height), colour, thick)
        for y in range(0, height + 1, step):
            draw.line((0, min(y, height - 1), width, min(y, height - 1)), colour, thick)


def _numbers(draw: "ImageDraw.ImageDraw", seen: Seen, token: int, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont") -> None:
    """Each token's place among the image's tokens."""
    for row in range(seen.rows):
        for column in range(seen.columns):
            at = (column * token + 4, row * token + 3)
            draw.text(at, str(row * seen.columns + column), (255, 255, 255, 255), font, stroke_width=1, stroke_fill=(0, 0, 0, 200))


def _rulers(draw: "ImageDraw.ImageDraw", seen: Seen, token: int, top: int, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont") -> None:
    """Row and column numbers, so far apart that they do not touch."""
    every = -(-32 // token)
    draw.text((_MARGIN - 28, top - 20), "h \\ w", _FAINT, font)
    for column in range(0, seen.columns, every):
        draw.text((_MARGIN + column * token + token // 2, top - 6), str(column), _INK, font, anchor="ms")
    for row in range(0, seen.rows, every):
        draw.text((_MARGIN - 6, top + row * token + token // 2), str(row), _INK, font, anchor="rm")
