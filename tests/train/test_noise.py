"""NEFTune: the bound of the noise is that of the paper and of TRL, it is repeatable, and only training hears it."""

import math

import pytest
import torch

from ernie45.train.noise import EmbeddingNoise
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_batch, make_decoder

ENDS = (4, 4 + 100)
WIDTH = 64


def test_the_noise_fills_its_bound_and_no_more():
    noise_TD = EmbeddingNoise(5.0, seed=3)(torch.zeros(104, WIDTH), ENDS, step=0, batch=0)
    for begin, end in ((0, 4), (4, 104)):
        part, bound = noise_TD[begin:end], 5 / math.sqrt((end - begin) * WIDTH)
        assert part.abs().max() <= bound
        assert part.abs().max() > 0.95 * bound
        # uniform: the root mean square is bound / sqrt 3; 256 numbers spread it by 3 % or so
        assert part.square().mean().sqrt().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_one_document_has_the_bound_that_transformers_has():
    from transformers.integrations.neftune import neftune_post_forward_hook

    layer = torch.nn.Embedding(8, WIDTH)
    layer.neftune_noise_alpha = 5.0
    rows = torch.zeros(1, 50, WIDTH)
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(layer.train(), (), rows)
    ours = EmbeddingNoise(5.0, seed=0)(rows[0], (50,), 0, 0)
    # 3200 uniform numbers each: the largest is within a part in a thousand of the bound
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=3e-3)


def test_it_is_keyed_by_seed_step_and_batch():
    x_TD = torch.zeros(104, WIDTH)
    first = EmbeddingNoise(5.0, seed=3)(x_TD, ENDS, 7, 1)
    assert torch.equal(first, EmbeddingNoise(5.0, seed=3)(x_TD, ENDS, 7, 1))
    for seed, step, batch in ((4, 7, 1), (3, 8, 1), (3, 7, 0)):
        assert not torch.equal(first, EmbeddingNoise(5.0, seed=seed)(x_TD, ENDS, step, batch))


def test_a_step_learns_through_it_and_the_model_stays_as_it_is():
    def learner(noise):
        decoder = make_decoder()
        return Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig(), noise=noise)

    plain, noisy = learner(None), learner(EmbeddingNoise(50.0, seed=0))
    before = noisy.decoder.prompt_logits([5, 9, 77])
    assert torch.equal(before, plain.decoder.prompt_logits([5, 9, 77]))
    assert abs(plain([make_batch()], 0, 1e-2).loss - noisy([make_batch()], 0, 1e-2).loss) > 1e-3
    losses = [noisy([make_batch()], n, 1e-2).loss for n in range(1, 15)]
    assert losses[-1] < losses[0] - 0.5
