"""Models whose feed-forward learns in FP8: which layers do, that nothing is renamed, and that the loss goes where bfloat16's goes."""

import pytest
import torch

from ernie45.models.text import Decoder
from ernie45.quant.fp8_training import Fp8TrainedExperts, Fp8TrainedLinear, train_in_fp8
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_batch, make_decoder


def learned(decoder: Decoder, steps: int) -> list[float]:
    step = Step(decoder, Optimiser(decoder, OptimiserConfig(weight_decay=0.0), 16), LossConfig())
    return [step([make_batch((12, 20, 8), seed=n % 3)], n, 1e-3).loss for n in range(steps)]


@pytest.mark.parametrize("experts", [False, True])
def test_the_feed_forward_alone_is_changed_and_nothing_is_renamed(experts):
    decoder = make_decoder(experts=experts)
    before = {name: parameter.data_ptr() for name, parameter in decoder.named_parameters()}
    changed = train_in_fp8(decoder)
    assert {name: parameter.data_ptr() for name, parameter in decoder.named_parameters()} == before
    kinds = {name: type(module) for name, module in decoder.named_modules() if isinstance(module, Fp8TrainedLinear | Fp8TrainedExperts)}
    assert set(kinds) == set(changed)
    assert all(".ffn." in name for name in kinds)
    assert (Fp8TrainedExperts in kinds.values()) == experts
    assert len([name for name in kinds if name.startswith("layers.0.")]) == 2  # the first layer is dense: gate and up, down


@pytest.mark.parametrize("experts", [False, True])
def test_the_loss_follows_bfloat16(experts):
    """Twenty steps on the same batches. E4M3 has 4 digits where bfloat16 has 8; the curve is the same to a few percent."""
    plain, fp8 = make_decoder(experts=experts).to(torch.bfloat16), make_decoder(experts=experts).to(torch.bfloat16)
    for decoder in (plain, fp8):  # routers stay float32, as in a model that was loaded
        for name, parameter in decoder.named_parameters():
            if "router" in name:
                parameter.data = parameter.data.float()
    train_in_fp8(fp8)
    expected, found = learned(plain, 20), learned(fp8, 20)
    assert expected[-1] < 0.8 * expected[0]
    assert found[0] != expected[0]
    assert found == pytest.approx(expected, rel=0.1)  # an expert chosen otherwise moves a batch by 7 %
