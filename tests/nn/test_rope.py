"""Published values of the rotary table, and its independence of the model's compute type."""

import torch

from ernie45.models.released import CHECKPOINTS
from ernie45.models.text import Decoder
from ernie45.nn.rope import inverse_frequencies, turns


def test_inverse_frequencies_are_the_published_ones():
    frequencies = inverse_frequencies(128, 500_000.0)
    assert frequencies.shape == (64,)
    for i, want in ((0, 1.0), (1, 8.14617217e-01), (31, 1.73604675e-03), (63, 2.45514070e-06)):
        # the published values carry nine digits of a float32 power
        assert abs(frequencies[i].item() / want - 1) < 2e-7


def test_turns_are_exact_to_float32_at_the_last_position():
    frequencies = inverse_frequencies(128, 500_000.0)
    got = turns(torch.tensor([0, 131_071]), frequencies)
    assert torch.equal(got[0], torch.ones(64, dtype=torch.complex64))
    angle = (131_071 * frequencies).double()  # the float32 product is the definition, see the reference
    want = torch.complex(angle.cos(), angle.sin())
    assert (got[1] - want).abs().max() < 1e-6


def test_a_cast_of_the_model_leaves_the_frequencies_alone():
    with torch.device("meta"):
        model = Decoder(CHECKPOINTS["ERNIE-4.5-0.3B"].text).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.frequencies_P.dtype == torch.float32
    assert model.frequencies_P.device.type == "cpu"
    assert torch.equal(model.frequencies_P, inverse_frequencies(128, 500_000.0))
