"""Time to the first token behind one picture of 1920 x 1080, by its parts, beside the floor that the multiplications alone would take.

The model is random, with a tower of two blocks of half the published width: what is measured is the way of a picture through the code. The
floor is the number of multiplications over the speed of one large product, measured in the same run.

    python benchmarks/picture.py
"""

import io
import time

import torch
from PIL import Image

from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.request import PlacedPicture, Request, SamplingParams
from ernie45.models.released import tiny
from ernie45.models.text import Decoder
from ernie45.models.vision_config import VisionConfig
from ernie45.tokens.images import read_image
from ernie45.tokens.pictures import Picture, PixelRules

SEEN, START, END = 500, 501, 502
VISION = VisionConfig(
    depth=2, size=640, num_heads=8, ffn_size=2560, expert_size=64, time_frequencies=6,
    image_id=SEEN, video_id=SEEN, image_start_id=START, image_end_id=END, video_start_id=503, video_end_id=504,
)  # fmt: skip


def photograph() -> bytes:
    """A JPEG of 1080 lines that is not one colour."""
    made = Image.radial_gradient("L").resize((1920, 1080))
    file = io.BytesIO()
    Image.merge("RGB", (made, made.rotate(90), made.rotate(180))).save(file, "JPEG")
    return file.getvalue()


def speed(size: int = 2048) -> float:
    """Multiplications a second of a float32 product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    began = time.perf_counter()
    a @ b
    return size**3 / (time.perf_counter() - began)


def cost(picture: Picture, width: int) -> float:
    """Multiplications of tower and resampler for one image of N patches."""
    N, D, F, W = picture.tokens * picture.merge**2, VISION.size, VISION.ffn_size, VISION.joined_size
    block = N * (4 * D * D + 2 * D * F + 2 * N * D)
    return VISION.depth * block + N * VISION.patch_values * D + picture.tokens * (2 * W * W + 2 * W * W + W * W + W * width)


def main() -> None:
    """Prints seconds by part."""
    decoder = Decoder(tiny(experts=True), VISION).initialise(torch.Generator().manual_seed(0)).eval()
    engine = Engine(decoder, EngineConfig(num_pages=128, max_length=4096), rules=PixelRules())
    data, peak = photograph(), speed()
    began = time.perf_counter()
    picture = read_image(data, PixelRules())
    read = time.perf_counter()
    prompt = (1, START, *[SEEN] * picture.tokens, END, 7)
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.submit(Request(id="x", prompt=prompt, pictures=(PlacedPicture(2, picture),), params=params))
    while engine.load.waiting:
        engine.step()
    encoded = time.perf_counter()
    while not engine.idle:
        engine.step()
    done = time.perf_counter()
    floor = cost(picture, decoder.config.hidden_size) / peak
    print(f"picture {picture.width} x {picture.height}, {picture.tokens} tokens, {torch.get_num_threads()} threads")
    print(f"read and resize  {read - began:7.2f} s\nencode           {encoded - read:7.2f} s, floor {floor:.2f} s at {peak / 1e9:.0f} G/s")
    print(f"first token      {done - began:7.2f} s")


if __name__ == "__main__":
    main()
