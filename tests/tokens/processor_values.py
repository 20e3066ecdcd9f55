"""What transformers' own image and video processors make of two photographs and a film: writes tests/data/ernie-4.5-vl.processors.json.

    pip install torchvision==0.28.0 && python -m tests.tokens.processor_values

Run once, with transformers 5.23, torch 2.13 and torchvision 0.28; the tests read what it wrote, and so need no torchvision. Pixels are kept
as mean and standard deviation of each channel and as some values, evenly spread.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).parents[1] / "data" / "ernie-4.5-vl.processors.json"
VALUES = 400
RATE = 10
PICTURES = {"tall": (300, 200), "wide": (97, 410), "small": (30, 40)}
FILMS = {"leading": (40, 120, 160, {}), "by fps": (60, 90, 200, {"fps": 4}), "odd": (17, 64, 64, {})}


def wave(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """A smooth picture, uint8 [height, width, 3], by a formula: resizing it is well-behaved, and nobody must send a file along."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [127.5 + 127 * np.sin(x / (7 + 3 * c) + phase) * np.cos(y / (11 + 2 * c) - phase) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def film(count: int, height: int, width: int) -> np.ndarray:
    """Frames of it, [count, height, width, 3]."""
    return np.stack([wave(height, width, number / 5) for number in range(count)])


def summary(pixels_NP: np.ndarray) -> dict:
    """Statistics and some values of patches."""
    channels = pixels_NP.astype(np.float64).reshape(len(pixels_NP), 3, -1)
    some = pixels_NP.ravel()[:: max(1, pixels_NP.size // VALUES)][:VALUES]
    return {"mean": channels.mean((0, 2)).tolist(), "std": channels.std((0, 2)).tolist(), "values": [round(float(v), 6) for v in some]}


def main() -> None:
    """Ask both processors."""
    # a torchvision built for CUDA has no operators beside a CPU torch; its Python half, all that is needed here, does without this file
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    from transformers import Ernie4_5_VLMoeImageProcessor, Ernie4_5_VLMoeVideoProcessor
    from transformers.video_utils import VideoMetadata

    told: dict = {"images": {}, "videos": {}}
    for name, size in PICTURES.items():
        made = Ernie4_5_VLMoeImageProcessor()(torch.from_numpy(wave(*size)).permute(2, 0, 1), return_tensors="pt")
        told["images"][name] = {"grid": made["image_grid_thw"][0].tolist(), **summary(made["pixel_values"].numpy())}
    for name, (count, height, width, asked) in FILMS.items():
        frames = torch.from_numpy(film(count, height, width)).permute(0, 3, 1, 2)
        meta = VideoMetadata(total_num_frames=count, fps=RATE, duration=count / RATE, frames_indices=list(range(count)))
        judge = Ernie4_5_VLMoeVideoProcessor()
        chosen = judge.sample_frames(meta, **asked).tolist()
        made = judge(frames, video_metadata=meta, draw_on_frames=False, return_tensors="pt", **asked)
        found = summary(made["pixel_values_videos"].numpy())
        told["videos"][name] = {"chosen": chosen, "grid": made["video_grid_thw"][0].tolist(), **found}
    FILE.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
