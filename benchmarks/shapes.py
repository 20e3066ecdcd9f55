"""Random-weight checkpoints of published shapes, in the published PyTorch layout: the same folder feeds every peer."""

from pathlib import Path

import torch

from ernie45.models.released import CHECKPOINTS, tiny
from ernie45.models.save import save_model
from ernie45.models.text import Decoder

SHAPES = {name.removeprefix("ERNIE-4.5-"): release.text for name, release in CHECKPOINTS.items() if release.vision is None}
SHAPES["tiny"] = tiny()
SHAPES["tiny-experts"] = tiny(experts=True)


def make_checkpoint(shape: str, folder: Path) -> Path:
    """Write the shape with normal weights of standard deviation 0.02 in bfloat16, unless the folder is there already."""
    if not (folder / "config.json").exists():
        torch.set_default_dtype(torch.bfloat16)
        decoder = Decoder(SHAPES[shape]).initialise(torch.Generator().manual_seed(0))
        torch.set_default_dtype(torch.float32)
        save_model(decoder, folder)
    return folder
