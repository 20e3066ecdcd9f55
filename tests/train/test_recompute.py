"""Less memory, the same gradients: parts computed again, intermediate values and optimiser state in files."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.models.released import tiny
from ernie45.nn.attention import PackedCausal
from ernie45.train import recompute
from ernie45.train.batch import pack
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.recompute import Offload, Part, choose, computed_again, filed, measure
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_decoder, make_examples

BATCH = pack(make_examples((40, 24)))
LOSSES = LossConfig(balance=0.1, z=0.1, orthogonal=0.1, bias_rate=0.1)


def model():
    return make_decoder(replace(tiny(experts=True), num_mtp=1))


def forward(decoder):
    return decoder(decoder.embed(BATCH.tokens_T), BATCH.positions_T, PackedCausal(list(BATCH.doc_ends)))


def steps(decoder, optimiser, keep=None, count=3):
    """Losses, loads and weights after some steps."""
    learner = Step(decoder, optimiser, LOSSES, **({} if keep is None else {"keep": keep}))
    reports = [learner([BATCH, BATCH], step, 1e-2) for step in range(count)]
    learner.watch.close()
    return [(report.loss, report.norm, report.load) for report in reports], [p.detach().clone() for p in decoder.parameters()]


@pytest.fixture(scope="module")
def plain():
    decoder = model()
    return steps(decoder, Optimiser(decoder, OptimiserConfig(), 16))


def assert_equal(found, plain):
    assert found[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], plain[1], strict=True))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_parts_computed_again_give_the_same_to_the_bit_and_keep_what_was_said(plain, share):
    decoder = model()
    parts = measure(decoder, lambda: forward(decoder))
    assert len(parts) == 2 * len(decoder.layers)
    assert all(part.bytes > 0 and part.seconds > 0 for part in parts)
    again = choose(parts, int(share * sum(part.bytes for part in parts)))
    assert (len(again) == 0, len(again) == len(parts)) == (share == 1.0, share == 0.0)
    with computed_again(decoder, again):
        held = {(part.layer, part.name): part.bytes for part in measure(decoder, lambda: forward(decoder))}
        found = steps(decoder, Optimiser(decoder, OptimiserConfig(), 16))
    for part in parts:  # attention keeps the turns of its positions too, which all layers share
        assert held[part.layer, part.name] <= part.bytes / 8 if part in again else held[part.layer, part.name] == part.bytes
    assert_equal(found, plain)
    assert "forward" not in vars(decoder.layers[0].attn)


def test_saved_values_in_files_are_the_same_to_the_bit(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(recompute, "LEAST_BYTES", 1)
    decoder = model()
    keep = Offload(decoder, tmp_path)
    assert_equal(steps(decoder, Optimiser(decoder, OptimiserConfig(), 16), keep), plain)
    kept = sum(part.bytes for part in measure(decoder, lambda: forward(decoder)))
    assert keep.written > 6 * kept  # six batches; what lies between the layers comes on top
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimiser_state_in_files_is_the_same_to_the_bit(tmp_path, kind, dtype):
    found = []
    for folder in (None, tmp_path):
        decoder = make_decoder().to(dtype)
        optimiser = Optimiser(decoder, OptimiserConfig(kind=kind), 16, folder)
        learner = Step(decoder, optimiser, LossConfig())
        for step in range(2):
            learner([BATCH], step, 1e-2)
        resumed = make_decoder().to(dtype)
        resumed.load_state_dict(decoder.state_dict())
        again = Optimiser(resumed, OptimiserConfig(kind=kind), 16, folder)
        again.load_state({key: value.clone() for key, value in optimiser.state().items()}, "here")
        report = Step(resumed, again, LossConfig())([BATCH], 2, 1e-2)
        found.append((report.loss, {key: value.clone() for key, value in again.state().items()}))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())
    assert not list(tmp_path.iterdir())


def test_a_tensor_in_a_file_is_a_copy(tmp_path):
    tensor = torch.arange(6.0).view(2, 3)
    held = filed(tensor, tmp_path)
    held[0, 0] = 9.0
    assert tensor[0, 0] == 0
    assert torch.equal(held[1], tensor[1])
    assert filed(torch.zeros(0, 4), tmp_path).shape == (0, 4)


PARTS = st.lists(
    st.builds(Part, st.integers(0, 9), st.sampled_from(recompute.PARTS), st.integers(0, 10**9), st.floats(1e-6, 10)), max_size=12
)


@given(PARTS, st.integers(0, 10**10))
def test_the_choice_fits_and_gives_up_nothing_dearer_than_it_keeps(parts, room):
    again = choose(parts, room)
    kept = list(parts)
    for part in again:
        kept.remove(part)
    assert sum(part.bytes for part in kept) <= room
    if again:
        last = again[-1]
        assert sum(part.bytes for part in kept) + last.bytes > room
        assert all(part.bytes / part.seconds <= min(p.bytes / p.seconds for p in again) for part in kept)
