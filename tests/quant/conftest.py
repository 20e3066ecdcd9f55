"""Small float models for the tests of this room."""

import pytest
import torch

from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.text import Decoder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(experts: bool = False, bias: bool = False, tied: bool = True, seed: int = 0, mtp: int = 0) -> Decoder:
    """A decoder with weights large enough that every part matters."""
    config = TextConfig(
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        ffn_size=96,
        vocab_size=160,
        tie_embeddings=tied,
        use_bias=bias,
        num_mtp=mtp,
        experts=ExpertsConfig(num_experts=6, top_k=2, expert_size=32, num_shared=1, first_layer=1, last_layer=2) if experts else None,
    )
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(seed), std=0.12)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.3, 2.0, generator=torch.Generator().manual_seed(seed + 1))
            elif name.endswith("bias") and "selection" not in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed + 2))
    return decoder.eval().requires_grad_(False)


def taught(through, x_TI, wanted_TO, rate, close):
    """Let a layer learn, through its rounding, to give the outputs wanted. The mean squared error of rounding to nearest, which it
    begins with, and that of the packed layer at the end, which must be what the layer had in training, as close as said.
    """
    optimiser = torch.optim.Adam(through.parameters(), lr=rate)

    def lost(layer):
        return (layer(x_TI) - wanted_TO).square().mean()

    nearest = lost(through).item()
    for _ in range(150):
        optimiser.zero_grad()
        lost(through).backward()
        optimiser.step()
    with torch.no_grad():
        packed = lost(through.packed()).item()
        assert packed == pytest.approx(lost(through).item(), rel=close)
    return nearest, packed


@pytest.fixture(scope="session")
def tiny():
    """Makes small decoders: see `made`."""
    return made
