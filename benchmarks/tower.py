"""The vision tower beside transformers', in one process and taking turns; random weights.

python benchmarks/tower.py [--depth 4] [--sizes 476x644,1092x1932] [--threads 2] [--rounds 3]

Widths are the published ones. `--depth` blocks of the 32 are built, so that every side fits into a few hundred megabytes; a tower's time is
that of its blocks, and tokens per second are given for all 32. Each side computes in float32 and bfloat16, ours also with weights and
activations of 8 bits. Prints tokens of the decoder per second (4 patches each), milliseconds as measured, and the median
over the rounds of the ratio to the fastest side of transformers in the same round.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from transformers import Ernie4_5_VLMoeConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeVisionTransformerPretrainedModel

from ernie45.models.text import fill_initial
from ernie45.models.vision import Tower
from ernie45.models.vision_config import VisionConfig
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec, Rule

PUBLISHED_DEPTH = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Side = Callable[[Tensor, tuple[int, int, int]], Tensor]
"""Patches and their grid to hidden states."""


def ours(depth: int) -> Tower:
    """The published tower with `depth` blocks."""
    tower = Tower(VisionConfig(depth=depth, expert_size=512))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tower.requires_grad_(False).named_parameters():
        fill_initial(name, parameter, generator)
    return tower.eval()


def running(tower: Tower, dtype: torch.dtype) -> Side:
    """Ours in a type."""
    for parameter in tower.parameters():  # packed matrices are buffers and keep their types
        parameter.data = parameter.data.to(dtype)
    return lambda patches, grid: tower(patches.to(dtype), [grid])


def theirs(depth: int, dtype: torch.dtype) -> Side:
    """transformers' tower in a type."""
    config = Ernie4_5_VLMoeConfig(vision_config={"depth": depth}).vision_config
    config._attn_implementation = "sdpa"
    tower = Ernie4_5_VLMoeVisionTransformerPretrainedModel(config).to(dtype).eval()
    return lambda patches, grid: tower(patches.to(dtype), torch.tensor([grid])).last_hidden_state


def made_sides(depth: int) -> dict[str, Side]:
    """Every side by name."""
    plain = ours(depth)
    packed = copy.deepcopy(plain)
    quantise_model(packed, QuantSpec(rules=(Rule(pattern="patches", scheme=None), Rule(pattern="*", scheme="w8a8"))))
    sides: dict[str, Side] = {}
    for name, dtype in DTYPES.items():
        sides[f"transformers {name}"] = theirs(depth, dtype)
        sides[f"ernie45 {name}"] = running(copy.deepcopy(plain), dtype)
    return sides | {"ernie45 w8a8 in bfloat16": running(packed, torch.bfloat16)}


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--sizes", default="476x644,1092x1932")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="comma-separated beginnings of the names of sides to run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides = {name: run for name, run in made_sides(options.depth).items() if name.startswith(tuple(options.only.split(",")))}
    print("| picture | side | tokens/s | ms, best and median | beside transformers' best |\n|---|---|---|---|---|")
    for size in options.sizes.split(","):
        height, width = (int(part) // 14 for part in size.split("x"))
        patches, grid = torch.randn(height * width, 588), (1, height, width)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, run in sides.items():
                start = time.perf_counter()
                run(patches, grid)
                times[name].append(time.perf_counter() - start)
        # by turns within a second: the machine's speed may halve from one round to the next, the ratio of neighbours does not
        peers = [min(each) for each in zip(*(t for name, t in times.items() if name.startswith("transformers")), strict=True)]
        for name, seconds in times.items():
            rate = height * width / 4 / min(seconds) * options.depth / PUBLISHED_DEPTH
            ratio = median(peer / own for peer, own in zip(peers, seconds, strict=True)) if peers else float("nan")
            print(
                f"| {size} | {name} | {rate:,.0f} | {min(seconds) * 1000:,.0f}, {median(seconds) * 1000:,.0f} | {ratio:.2f}x |", flush=True
            )


if __name__ == "__main__":
    main()
