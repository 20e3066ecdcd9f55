"""A block of the vision tower in two native calls against its plain twin, whole and packed, frames in parts and many at once."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie45.models.text import fill_initial
from ernie45.models.vision import Tower, TowerBlock
from ernie45.models.vision_config import VisionConfig
from ernie45.models.vision_pieces import encode_in_pieces
from ernie45.nn.rope import inverse_frequencies, turns_of_patches
from ernie45.ops.native import Native
from ernie45.ops.tower import NativeTowerBlock
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec, Rule

pytestmark = pytest.mark.native

some = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def amx(kernels):
    if "amx" not in kernels.available:
        pytest.skip("this machine has no AMX tiles")
    return Native("amx", kernels.available)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tower(size=64, heads=4, inner=128, depth=1, seed=0, scheme=None, **changes) -> Tower:
    """Norms and biases as random as the rest: zeros and ones would hide what is missing."""
    made = Tower(VisionConfig(depth=depth, size=size, num_heads=heads, ffn_size=inner, patch_size=4, expert_size=16, **changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.requires_grad_(False).named_parameters():
        fill_initial(name, parameter, generator)
        if parameter.dim() == 1:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
        else:
            parameter *= 6  # scores and activations that differ
    if scheme is not None:
        quantise_model(made, QuantSpec(rules=(Rule(pattern="patches", scheme=None), Rule(pattern="*", scheme=scheme))))
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16()
    return made.eval()


def widened(block: TowerBlock) -> TowerBlock:
    """The plain twin in float32 for the same bfloat16 numbers."""
    for parameter in block.parameters():
        parameter.data = parameter.data.float()
    return block


def one_block(calls, x_GPD, turns_PQ, step=None):
    G, P, _ = x_GPD.shape
    space, step = calls.space(G, P), step or P
    for at in range(0, P, step):
        calls.heads(x_GPD[:, at : at + step].contiguous(), turns_PQ[at : at + step].contiguous(), space, P, at)
    return torch.cat([calls.rest(x_GPD[:, at : at + step].contiguous(), space, P, at) for at in range(0, P, step)], dim=1)


def native(amx, block) -> NativeTowerBlock:
    with torch.inference_mode():
        calls = block.calls()
    assert isinstance(calls, NativeTowerBlock)
    return calls


@some
@given(
    frames=st.integers(1, 3), down=st.integers(1, 9), across=st.integers(1, 14),
    heads=st.sampled_from([(64, 4), (128, 1), (192, 2), (320, 4)]), inner=st.sampled_from([64, 320]), seed=st.integers(0, 9),
)  # fmt: skip
def test_a_block_equals_its_twin(amx, frames, down, across, heads, inner, seed):
    size, count = heads
    made = tower(size, count, inner, seed=seed)
    turns_PQ = turns_of_patches((2 * down, 2 * across), 2, made.frequencies_Q)
    x = random(frames, 4 * down * across, size, seed=seed + 1).bfloat16()
    with torch.inference_mode():
        got = one_block(native(amx, made.blocks[0]), x, turns_PQ)
        want = one_block(widened(made.blocks[0]), x.float(), turns_PQ)
    # bfloat16 between the parts of a block, 2 ** -9 each, as separate layers have; float32 in the twin
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() <= 0.04 * want.abs().max()
    assert (got.float() - want).norm() <= 0.012 * want.norm()


def test_it_is_nearer_than_separate_bfloat16_layers(amx):
    made = tower(320, 4, 640)
    turns_PQ = turns_of_patches((18, 22), 2, made.frequencies_Q)
    x = random(1, 396, 320).bfloat16()
    with torch.inference_mode():
        got, layers = one_block(native(amx, made.blocks[0]), x, turns_PQ), one_block(made.blocks[0], x, turns_PQ)
        want = one_block(widened(made.blocks[0]), x.float(), turns_PQ)
    assert (got.float() - want).norm() <= (layers.float() - want).norm()


@pytest.mark.parametrize("step", [32, 64, 1024])
def test_parts_of_a_frame_give_the_bits_of_the_whole(amx, step):
    """More keys than one block of them, more patches than one pass of rows; the last part is no multiple of anything."""
    made = tower()
    calls, turns_PQ = native(amx, made.blocks[0]), turns_of_patches((62, 18), 2, made.frequencies_Q)
    x = random(1, 62 * 18, 64).bfloat16()
    assert torch.equal(one_block(calls, x, turns_PQ, step), one_block(calls, x, turns_PQ))


def test_frames_do_not_see_each_other(amx):
    made = tower()
    calls, turns_PQ = native(amx, made.blocks[0]), turns_of_patches((6, 10), 2, made.frequencies_Q)
    x = random(3, 60, 64).bfloat16()
    together = one_block(calls, x, turns_PQ)
    assert all(torch.equal(together[g], one_block(calls, x[g : g + 1], turns_PQ)[0]) for g in range(3))


@pytest.mark.parametrize("seed", range(3))
def test_packed_blocks_equal_their_twins(amx, seed):
    """Rounded to bfloat16, an activation may fall on the other side of a half: as near to the twin in float32 as separate layers are."""
    made = tower(320, 4, 640, scheme="w8a8", seed=seed)
    turns_PQ = turns_of_patches((14, 10), 2, made.frequencies_Q)
    x = random(2, 140, 320, seed=seed).bfloat16()
    with torch.inference_mode():
        got, layers = one_block(native(amx, made.blocks[0]), x, turns_PQ), one_block(made.blocks[0], x, turns_PQ)
        want = one_block(widened(made.blocks[0]), x.float(), turns_PQ)
    assert (got.float() - want).norm() <= 1.1 * (layers.float() - want).norm()
    assert (got.float() - want).norm() <= 0.03 * want.norm()


def test_what_is_no_number_shows_and_stays_in_its_frame(amx):
    for scheme in (None, "w8a8"):
        made = tower(scheme=scheme)
        turns_PQ = turns_of_patches((4, 4), 2, made.frequencies_Q)
        x = random(2, 16, 64).bfloat16()
        x[1, 3, 5] = torch.nan
        got = one_block(native(amx, made.blocks[0]), x, turns_PQ)
        assert got[1].isnan().all()
        assert got[0].isfinite().all()


def test_large_scores_and_large_activations_stay_numbers(amx):
    made = tower()
    turns_PQ = turns_of_patches((8, 8), 2, made.frequencies_Q)
    for by in (1e4, 1e18):
        x = (random(1, 64, 64) * by).bfloat16()
        made.blocks[0].attn.qkv.weight.data = (random(192, 64, seed=3) * 30).bfloat16()
        assert one_block(native(amx, made.blocks[0]), x, turns_PQ).isfinite().all()


def test_a_tower_takes_the_kernels_where_they_fit_and_gradients_where_they_are_wanted(amx):
    made = tower(depth=2)
    patches, grids = random(3 * 4 * 4 + 24, 48).bfloat16(), [(3, 4, 4), (1, 4, 6)]
    with torch.inference_mode():
        assert all(isinstance(block.calls(), NativeTowerBlock) for block in made.blocks)
        got = made(patches, grids)
    assert made.blocks[0].calls() is made.blocks[0], "without inference mode somebody may want a gradient"
    want = made(patches, grids)
    assert (got.float() - want.float()).norm() <= 0.01 * want.float().norm()
    for changed in (tower(size=48, heads=4), tower(size=64, heads=8), tower(scheme="w8a8-g32"), tower(scheme="w4a8-h"), tower().float()):
        with torch.inference_mode():
            assert changed.blocks[0].calls() is changed.blocks[0]


def test_the_operators_refuse_what_does_not_fit(amx):
    made = tower()
    calls, x, turns_PQ = native(amx, made.blocks[0]), random(1, 64, 64).bfloat16(), turns_of_patches((8, 8), 2, made.frequencies_Q)
    space = calls.space(1, 64)
    calls.heads(x, turns_PQ, space, 64)
    for bad in (x.float(), x[:, :, :32], x[0], x.transpose(1, 2), torch.empty(0, 64, 64).bfloat16()):
        with pytest.raises(RuntimeError):
            calls.heads(bad, turns_PQ, space, 64)
        with pytest.raises(RuntimeError):
            calls.rest(bad, space, 64)
    for patches, first in ((64, 32), (64, -32), (64, 16), (100, 0), (63, 0), (2**62, 0), (64, 2**62)):
        with pytest.raises(RuntimeError):
            calls.rest(x, space, patches, first)
    for bad in (turns_PQ[:63], turns_PQ[:, :4], turns_PQ.to(torch.complex128)):
        with pytest.raises(RuntimeError):
            calls.heads(x, bad, space, 64)
    for isa in set(amx.available) - {"amx"}:
        with pytest.raises(RuntimeError, match="no vision towers"):
            NativeTowerBlock.rest(type("Fake", (), {"_isa": isa, "_block": calls._block})(), x, space, 64)


def test_the_operators_keep_torchs_rules(amx):
    for scheme in (None, "w8a8"):
        calls, x = native(amx, tower(scheme=scheme).blocks[0]), random(1, 36, 64).bfloat16()
        space, turns_PQ = calls.space(1, 36), turns_of_patches((6, 6), 2, inverse_frequencies(8, 1e4))
        seen = []
        for name in ("tower_heads", "tower_rest"):
            operator = getattr(torch.ops.ernie45, name)
            seen.append((operator.default, arguments_of(calls, name, x, turns_PQ, space)))
        for operator, arguments in seen:
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def arguments_of(calls, name, x, turns_PQ, space):
    """What the wrapper hands to an operator."""
    from torch.utils._python_dispatch import TorchDispatchMode

    caught = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() == f"ernie45::{name}":
                caught.append(args)
            return function(*args, **(kwargs or {}))

    with Listen():
        calls.heads(x, turns_PQ, space, 36)
        calls.rest(x, space, 36)
    return caught[0]


@pytest.mark.parametrize("frames", [1, 2])
def test_pieces_of_a_picture_are_its_whole(amx, frames):
    from ernie45.models.vision import Sight

    sight = Sight(VisionConfig(depth=2, size=64, num_heads=4, ffn_size=128, patch_size=4, expert_size=16), 32, 1e-5).requires_grad_(False)
    for name, parameter in sight.named_parameters():
        fill_initial(name, parameter, torch.Generator().manual_seed(1))
        parameter.data = parameter.data.bfloat16()
    patches, grid = random(frames * 80, 48), (frames, 8, 10)
    with torch.inference_mode():
        pieces = encode_in_pieces(sight, patches, grid, 40)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                got = done.value
                break
        want = sight.encode(patches, grid)
    assert (got.float() - want.float()).norm() <= 0.01 * want.float().norm()  # the resampler's rows are divided otherwise
