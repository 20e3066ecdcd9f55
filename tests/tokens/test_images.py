"""Files of strangers: each becomes the right picture or an error that says what is wrong."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ernie45.errors import RequestError
from ernie45.tokens.images import ImageLimits, open_image, read_image
from ernie45.tokens.pictures import PixelRules

# Pillow grumbles about what is damaged and goes on; what comes of it is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

LIMITS = ImageLimits()
RED, GREEN, BLUE = (220, 30, 20), (20, 200, 40), (10, 40, 210)


def saved(image, format, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def half(left, right, size=(40, 20), mode="RGB"):
    """Two colours side by side."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def colours(image):
    """The colour in the middle of each half."""
    width, height = image.size
    return image.getpixel((width // 4, height // 2)), image.getpixel((3 * width // 4, height // 2))


def near(found, wanted, by=6):
    return all(abs(a - b) <= by for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_every_format_on_the_list_is_read(format):
    image = open_image(saved(half(RED, BLUE), format), LIMITS)
    assert image.mode == "RGB"
    assert near(colours(image), (RED, BLUE), by=12)


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "PCX", "JPEG2000"])
def test_other_formats_are_refused(format):
    with pytest.raises(RequestError, match="no image of a known format"):
        open_image(saved(half(RED, BLUE), format), LIMITS)


def test_cmyk_comes_out_in_its_colours():
    assert near(colours(open_image(saved(half(RED, BLUE).convert("CMYK"), "JPEG", quality=95), LIMITS)), (RED, BLUE), by=12)


def test_grey_of_16_bits_keeps_its_upper_8():
    data = saved(Image.fromarray(np.array([[0, 255, 256, 25_800, 65_535]], np.uint16)), "PNG")
    assert open_image(data, LIMITS).tobytes()[::3] == bytes([0, 0, 1, 100, 255])


def test_transparent_parts_are_white():
    see_through = half((*RED, 255), (*BLUE, 0), mode="RGBA")
    assert colours(open_image(saved(see_through, "PNG"), LIMITS)) == (RED, (255, 255, 255))
    grey = half((90, 255), (10, 0), mode="LA")
    assert colours(open_image(saved(grey, "PNG"), LIMITS)) == ((90, 90, 90), (255, 255, 255))
    veil = half((*RED, 255), (0, 0, 0, 128), mode="RGBA")
    assert near(colours(open_image(saved(veil, "PNG"), LIMITS)), (RED, (127, 127, 127)), by=2)


def test_a_palette_with_alpha_is_white_where_it_is_transparent():
    palette = half(0, 1, mode="P")
    palette.putpalette([*RED, *BLUE])
    assert colours(open_image(saved(palette, "PNG"), LIMITS)) == (RED, BLUE)
    assert colours(open_image(saved(palette, "PNG", transparency=1), LIMITS)) == (RED, (255, 255, 255))
    assert colours(open_image(saved(palette, "GIF", transparency=1), LIMITS)) == (RED, (255, 255, 255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_turn_and_mirror(orientation):
    """The stored pixels are what the camera's note turns into the scene: red left, blue right, green the lower half."""
    scene = half(RED, BLUE, (80, 40))
    scene.paste(GREEN, (0, 20, 80, 40))
    turn = Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    stored = scene.transpose(undo[orientation]) if orientation in undo else scene
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(saved(stored, "PNG", exif=exif), LIMITS)
    assert image.size == (80, 40)
    assert [image.getpixel(at) for at in ((20, 10), (60, 10), (40, 30))] == [RED, BLUE, GREEN]


def test_a_damaged_exif_block_turns_nothing():
    data = saved(half(RED, BLUE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert near(colours(open_image(data, LIMITS)), (RED, BLUE), by=12)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(format):
    frames = [half(RED, BLUE), half(GREEN, GREEN)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], duration=100)
    assert near(colours(open_image(data, LIMITS)), (RED, BLUE), by=12)


@pytest.mark.parametrize(("size", "grid"), [((1, 1), (1, 4, 4)), ((2100, 10), (1, 2, 400)), ((10, 2100), (1, 400, 2))])
def test_tiny_and_thin_images_become_pictures(size, grid):
    picture = read_image(saved(Image.new("RGB", size, RED), "PNG"), PixelRules(), LIMITS)
    assert picture.grid == grid
    assert set(zip(*[iter(picture.rgb)] * 3, strict=True)) == {RED}


def png(width, height, body=b""):
    """A PNG whose head claims a size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no image of a known format"),
        (b"hello", "no image of a known format"),
        (b"%PDF-1.7", "no image of a known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a known format"),
        (png(9000, 9000), "has 9000x9000 pixels; at most 50,000,000"),
        (png(12_000, 12_000), "has more than 50,000,000 pixels"),
        (png(60_000, 60_000), "has more than 50,000,000 pixels"),
        (png(2_000_000_000, 2_000_000_000), "pixels"),
        (png(0, 0), "no image of a known format|damaged"),
        (png(64, 64), "damaged"),
        (png(64, 64, bytes(100)), "damaged"),
        (bytes(LIMITS.file_bytes + 1), "the image file has 20,971,521 bytes; at most 20,971,520"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{len(value)} bytes",
)
def test_bombs_and_wrong_files_are_refused(data, says):
    with pytest.raises(RequestError, match=says):
        open_image(data, LIMITS)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = saved(Image.new("RGB", (21, 20)), "BMP")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="21x20 pixels; at most 400"):
        open_image(data, ImageLimits(pixels=400))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_truncated_files_are_refused(photo, format):
    data = saved(Image.open(io.BytesIO(photo("rocket.jpg"))).convert("RGB"), format)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(RequestError, match=r"damaged|known format"):
            open_image(data[: int(len(data) * share)], LIMITS)


@settings(max_examples=150)
@given(st.data())
def test_damaged_files_are_pictures_or_refusals_never_a_crash(data):
    """Bytes flipped anywhere: Pillow's decoders fail in many ways, and each must come out as the caller's mistake."""
    format = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]))
    file = bytearray(saved(half(RED, BLUE), format))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(file), LIMITS)
    except RequestError:
        return
    assert image.mode == "RGB"
