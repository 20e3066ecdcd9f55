"""Files of strangers -> pictures: opened by Pillow, within limits, upright, on white, resized. Animations give their first frame.

What is too large is refused by what the file's head says, before a pixel is decoded. Formats are a list: a decoder that nobody needs is a
hole that nobody watches. Colour profiles are not applied, as in the original processor.
"""

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ernie45.errors import MissingExtra, RequestError
from ernie45.tokens.pictures import Picture, PixelRules

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_SIXTEEN_BITS = "I"  # modes I, I;16, I;16B: grey of 16 bits a pixel


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image file may be. file_bytes: its size;  pixels: of the image it holds, width times height."""

    file_bytes: int = 20 << 20
    pixels: int = 50_000_000


def read_image(data: bytes, rules: PixelRules, limits: ImageLimits | None = None) -> Picture:
    """An image file's bytes as the picture a model sees. Raises `RequestError` that says what is wrong, `MissingExtra` without Pillow."""
    return to_picture(open_image(data, limits or ImageLimits()), rules)


def open_image(data: bytes, limits: ImageLimits) -> "Image.Image":
    """The whole image, decoded: upright, RGB, transparent parts white. Raises as `read_image`."""
    pillow = load_pillow()
    if len(data) > limits.file_bytes:
        raise _bad(f"the image file has {len(data):,} bytes; at most {limits.file_bytes:,}")
    try:
        image = pillow.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > limits.pixels:
            raise _bad(f"the image has {width}x{height} pixels; at most {limits.pixels:,}")
        image.load()
        return _on_white(_upright(image))
    except pillow.UnidentifiedImageError:
        raise _bad(f"this is no image of a known format ({', '.join(FORMATS)}), or a damaged one") from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise _bad(f"the image has more than {limits.pixels:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, ArithmeticError, MemoryError) as error:
        # Pillow's decoders raise all of these for damaged files; whatever they say, the file is the caller's.
        raise _bad(f"the image file is damaged: {str(error) or type(error).__name__}") from None


def to_picture(image: "Image.Image", rules: PixelRules) -> Picture:
    """An RGB image resized by the rules, bicubic on bytes as the original processor does it."""
    width, height = image.size
    high, wide = rules.size(height, width)
    return Picture("image", 1, high, wide, resize(image, high, wide), rules.patch, rules.merge, rules.pair)


def resize(image: "Image.Image", height: int, width: int) -> bytes:
    """RGB bytes [height, width, 3] of a resized image."""
    return image.resize((width, height), load_pillow().Resampling.BICUBIC).tobytes()


def _upright(image: "Image.Image") -> "Image.Image":
    """Turned as the camera's EXIF says. A damaged EXIF block turns nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, struct.error, LookupError, TypeError, ArithmeticError):
        return image


def _on_white(image: "Image.Image") -> "Image.Image":
    """As RGB. What is transparent lies on white; grey of 16 bits keeps its upper 8."""
    if image.mode.startswith(_SIXTEEN_BITS):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        white = load_pillow().new("RGBA", image.size, (255, 255, 255, 255))
        white.paste(image, (0, 0), image)
        image = white
    return image.convert("RGB")


def load_pillow() -> Any:
    """Pillow's `Image` module. Raises `MissingExtra`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "vision") from error
    return Image


def _bad(text: str) -> RequestError:
    return RequestError(text, "messages")
