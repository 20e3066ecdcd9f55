"""Bytes of weights: exactly those of the real modules, whole and packed, for every published model."""

from dataclasses import replace

import pytest
import torch

from ernie45.models.names import FLOAT32_ENDINGS
from ernie45.models.released import RELEASES, tiny
from ernie45.models.sizes import matrices, weight_bytes
from ernie45.models.text import Decoder
from ernie45.models.vision_config import ModelConfig, VisionConfig
from ernie45.quant.model import prepare_model, quantisable
from ernie45.quant.spec import QuantSpec, Rule

SMALL_SIGHT = VisionConfig(depth=2, size=32, num_heads=2, ffn_size=72, patch_size=3, expert_size=24, time_frequencies=4)


CONFIGS = [
    ModelConfig(tiny()),
    ModelConfig(replace(tiny(num_mtp=1), tie_embeddings=False, use_bias=True)),
    ModelConfig(replace(tiny(experts=True), use_bias=True, head_bias=True)),
    ModelConfig(tiny(experts=True), SMALL_SIGHT),
    ModelConfig(replace(tiny(experts=True), tie_embeddings=False), SMALL_SIGHT),
]


def held(decoder, float_bytes):
    """Bytes of a network as it would be held."""
    sizes = {torch.uint8: 1, torch.float16: 2}
    return sum(
        tensor.numel() * (4 if name.endswith(FLOAT32_ENDINGS) else sizes.get(tensor.dtype, float_bytes))
        for name, tensor in decoder.state_dict().items()
    )


@pytest.mark.parametrize("word", [None, "w8a8", "w4a8-g32", "w4a8-g64"])
@pytest.mark.parametrize("config", CONFIGS)
def test_bytes_equal_the_modules(config, word):
    spec = QuantSpec(rules=(Rule(pattern="*.attn.out", scheme=None), Rule(pattern="*", scheme=word))) if word else None
    with torch.device("meta"):
        decoder = Decoder(config.text, config.vision)
        assert {matrix.name for matrix in matrices(config)} == {name for name, _ in quantisable(decoder)}
        if spec:
            prepare_model(decoder, spec)
    assert weight_bytes(config, spec) == held(decoder, 2)
    assert weight_bytes(config, spec, float_bytes=4) == held(decoder, 4)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_bytes_of_every_release(release):
    config = ModelConfig(release.text, release.vision)
    with torch.device("meta"):
        decoder = Decoder(release.text, release.vision)
    assert weight_bytes(config) == held(decoder, 2)
