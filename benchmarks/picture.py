"""Time to the first token behind one picture of 1920 x 1080, by its parts, beside the floor that the multiplications alone would take.

The model is random, with a tower of two blocks of half the published width: what is measured is the way of a picture through the code. The
floor is the number of multiplications over the speed of one large product, measured in the same run.

    python benchmarks/picture.py

With `--published bfloat16` (or w8a8) a tower and a resampler of the published sizes encode the picture, as the engine does it, with random
weights and no decoder behind them. `--depth` blocks of the 32 are built; seconds are as measured, for so many.
"""

import argparse
import io
import time

import torch
from PIL import Image

from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.request import PlacedPicture, Request, SamplingParams
from ernie45.models.released import tiny
from ernie45.models.text import Decoder
from ernie45.models.vision import Sight
from ernie45.models.vision_config import VisionConfig
from ernie45.models.vision_pieces import encode_in_pieces
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec, Rule
from ernie45.tokens.images import read_image
from ernie45.tokens.patches import patches
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


def published(scheme: str, depth: int) -> Sight:
    """The published sizes with random numbers, in bfloat16 or packed in 8 bits."""
    sight = Sight(VisionConfig(depth=depth, expert_size=512), 2560, 1e-5).requires_grad_(False).bfloat16()
    numbers = torch.randn(1 << 20).mul(0.02).bfloat16()
    for parameter in sight.parameters():
        parameter.data = numbers.repeat(-(-parameter.numel() // len(numbers)))[: parameter.numel()].view_as(parameter).contiguous()
    if scheme == "w8a8":
        quantise_model(sight, QuantSpec(rules=(Rule(pattern="*patches", scheme=None), Rule(pattern="*", scheme="w8a8"))))
    return sight.eval()


@torch.inference_mode()
def encode_published(scheme: str, depth: int) -> None:
    """Prints the seconds of the whole picture."""
    sight, picture = published(scheme, depth), read_image(photograph(), PixelRules())
    pixels = torch.from_numpy(patches(picture, PixelRules()))
    began = time.perf_counter()
    work = sum(encode_in_pieces(sight, pixels, picture.grid))
    seconds = time.perf_counter() - began
    print(
        f"{picture.tokens} tokens, {depth} blocks in {scheme}, {torch.get_num_threads()} threads: {seconds:.2f} s, "
        f"{2 * work / 1e12:.1f} TFLOP, {2 * work / 1e12 / seconds:.2f} TFLOP/s"
    )


def main() -> None:
    """Prints seconds by part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--published", choices=("bfloat16", "w8a8"))
    parser.add_argument("--depth", type=int, default=32)
    options = parser.parse_args()
    if options.published:
        return encode_published(options.published, options.depth)
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
    return None


if __name__ == "__main__":
    main()
