"""Picture and video files as strangers send them: each with the words of its refusal, or None where a picture comes of it."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from ernie45.tokens.images import ImageLimits
from ernie45.tokens.pictures import PixelRules

COLOUR = (220, 30, 20)


def saved(image, format, **settings) -> bytes:
    """An image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def png(width, height, body=b"") -> bytes:
    """A PNG whose head claims a size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def animation(frames: int) -> bytes:
    """A GIF of many frames."""
    shown = [Image.new("L", (40, 30), n % 250) for n in range(frames)]
    return saved(shown[0], "GIF", save_all=True, append_images=shown[1:], duration=20)


def turned() -> bytes:
    """A photograph whose camera lay on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.new("RGB", (80, 40), COLOUR), "JPEG", exif=exif)


def with_palette() -> bytes:
    """Colours by number, one of them seen through."""
    image = Image.new("P", (40, 20), 1)
    image.putpalette([*COLOUR, 10, 40, 210])
    return saved(image, "PNG", transparency=1)


def images() -> dict[str, tuple[bytes, str | None]]:
    """Name -> file, and what is said of it."""
    plain = Image.new("RGB", (64, 48), COLOUR)
    grey = Image.fromarray((np.arange(64 * 48).reshape(48, 64) * 20).astype(np.uint16))
    noise = saved(Image.effect_noise((200, 150), 90).convert("RGB"), "JPEG")
    return {
        "one pixel": (saved(Image.new("RGB", (1, 1), COLOUR), "PNG"), None),
        "thin and high": (saved(Image.new("RGB", (10, 2100), COLOUR), "PNG"), None),
        "thin and wide": (saved(Image.new("RGB", (2100, 10), COLOUR), "PNG"), None),
        "animated": (animation(300), None),
        "CMYK": (saved(plain.convert("CMYK"), "JPEG"), None),
        "16 bits": (saved(grey, "PNG"), None),
        "palette with alpha": (with_palette(), None),
        "turned by EXIF": (turned(), None),
        "pixel bomb in the head": (png(60_000, 60_000), "more than 50,000,000 pixels"),
        "pixel bomb that is there": (saved(Image.new("1", (8000, 8000)), "PNG"), "has 8000x8000 pixels; at most 50,000,000"),
        "byte bomb": (saved(plain, "PNG") + bytes(ImageLimits().file_bytes), "20,971,520"),
        "head without a body": (png(64, 64), "damaged"),
        "truncated": (noise[: len(noise) // 2], "damaged"),
        "empty": (b"", "no image of a known format"),
        "text": (b"hello, world", "no image of a known format"),
        "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "no image of a known format"),
        "TIFF": (saved(plain, "TIFF"), "no image of a known format"),
    }


def images_for(rules: PixelRules) -> dict[str, tuple[bytes, str | None]]:
    """The same for a model whose bounds leave no size for what is very thin."""
    found = images()
    if rules.factor**2 * 200 > rules.image_max:
        found |= {name: (found[name][0], "cannot be brought to between") for name in ("thin and high", "thin and wide")}
    return found


def film(
    count: int, format: str = "mp4", codec: str = "mpeg4", size: tuple[int, int] = (64, 48), seconds: Fraction = Fraction(1, 10)
) -> bytes:
    """A film of noise, so long from frame to frame; of no frames, it has a track and nothing in it."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        out.start_encoding()
        for number in range(count):
            frame = av.VideoFrame.from_image(Image.effect_noise(size, 60).convert("RGB"))
            frame.pts, frame.time_base = int(number * seconds * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    """An MP4 without pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        for start in range(0, 8192, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 8000, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def centuries(data: bytes) -> bytes:
    """The same film, whose head says that it and its track last as long as can be written."""
    changed = bytearray(data)
    for box, at in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
        place = changed.index(box) + 4
        struct.pack_into(">I", changed, place + at, 0xFFFFFFFE)
    return bytes(changed)


def videos() -> dict[str, tuple[bytes, str | None]]:
    """Name -> file, and what is said of it."""
    plain, web = film(20), film(20, format="webm", codec="libvpx")
    return {
        "one frame": (film(1), None),
        "ten days between frames": (film(6, format="webm", codec="libvpx", seconds=Fraction(864_000)), None),
        "a head that claims centuries": (centuries(plain), None),
        "cut off, with frames in front": (web[: len(web) * 2 // 3], None),
        "no frames": (film(0), "holds no video"),
        "sound alone": (sound(), "no video"),
        "cut off before its table": (plain[:-400], "damaged"),
        "an image": (saved(Image.new("RGB", (64, 48), COLOUR), "PNG"), "no video of a known container"),
        "a playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "no video of a known container"),
        "a head alone": (b"\0\0\0\x18ftypisom" + bytes(100), "damaged|no video"),
        "another container's head": (b"\x1a\x45\xdf\xa3" + plain[4:], "damaged|no video"),
        "frames too large": (film(1, size=(4096, 2304)), "4096x2304 pixels; at most"),
        "empty": (b"", "no video of a known container"),
    }
