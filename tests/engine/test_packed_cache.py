"""Keys and values of 8 and 4 bits: what rounding loses is bounded, no request sees another's slots, and an engine runs on them."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.engine.batch import BatchBuilder
from ernie45.engine.core import Engine, EngineConfig
from ernie45.engine.packed_cache import KV_BITS, PackedCache, cell_width, packed_bytes_per_token, restored, rounded
from ernie45.engine.request import Request, SamplingParams
from ernie45.engine.scheduler import Plan, PlanRow
from ernie45.errors import ConfigError
from ernie45.models.config import TextConfig
from ernie45.models.counts import kv_bytes_per_token
from ernie45.models.text import Decoder
from ernie45.ops import reference

CONFIG = TextConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, ffn_size=96, vocab_size=160)


@given(bits=st.sampled_from([4, 8]), size=st.sampled_from([2, 16, 48, 64, 96, 128]), seed=st.integers(0, 99), scale=st.floats(1e-6, 1e3))
def test_what_is_restored_is_half_a_step_away(bits, size, seed, scale):
    x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(seed)) * scale
    values, scales = rounded(x, bits)
    assert values.shape[-1] * 8 == size * bits
    step = x.unflatten(-1, (-1, cell_width(size, bits))).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    lost = (restored(values, scales, bits) - x).unflatten(-1, (-1, cell_width(size, bits))).abs()
    # half a step, and the scale's rounding to float16 (2 ** -11, or 2 ** -25 absolute below its normal range) times the largest number
    assert (lost <= step * (0.5 + 127 * 2**-11) + 127 * 2**-25).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_no_number_shows(bits):
    x = torch.ones(1, 2, 16)
    x[0, 0, 3] = torch.nan
    back = restored(*rounded(x, bits), bits)
    assert back[0, 0].isnan().all()
    assert (back[0, 1] - 1).abs().max() < 0.01


# errors of scores and values at random unit inputs: half a step of 127 or 7 parts of the largest of 16, a few of which add up
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.3)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_attention_is_near_the_reference_and_sees_only_its_own(bits, tolerance, heads):
    N, K = heads
    config = dataclasses.replace(CONFIG, num_heads=N, num_kv_heads=K, num_layers=1)
    generator = torch.Generator().manual_seed(3)
    cache, builder = PackedCache(config, 20, 4, torch.float32, bits), BatchBuilder(4)
    cache.scales.fill_(torch.nan)  # whatever lies in slots that are not its own, a row never sees it
    q, k, v = (torch.randn(18, n, 16, generator=generator) for n in (N, K, K))
    k[:, :, 5] *= 5  # one large dimension: without the turn, 4 bits would leave nothing of the others
    q[:, :, 5] /= 5
    start = 0
    for count in (7, 1, 5, 1, 1, 3):
        end = start + count
        batch = builder.build(Plan((PlanRow("x", tuple(range(count)), start, (3, 8, 9, 1, 19)[: -(-end // 4)], samples=False),)))
        out = cache.attend(batch)(0, q[start:end], k[start:end], v[start:end])
        truth = reference.causal_attention(q[start:end], k[:end], v[:end])
        assert ((out - truth).square().mean() / truth.square().mean()).sqrt() <= tolerance
        start = end


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_an_engine_runs_on_a_packed_cache(kv):
    decoder = Decoder(CONFIG).initialise(torch.Generator().manual_seed(0), std=0.12).eval()
    answers = {}
    for word in ("whole", kv):
        engine = Engine(decoder, EngineConfig(page_size=4, num_pages=40, kv=word))
        for i in range(3):
            engine.submit(Request(id=str(i), prompt=tuple(range(5 + i, 17)), params=SamplingParams(max_tokens=6, temperature=0.0)))
        found: dict[str, list[int]] = {str(i): [] for i in range(3)}
        while not engine.idle:
            for output in engine.step():
                found[output.request_id] += output.tokens
        engine.verify()
        answers[word] = found
    assert all(len(tokens) == 6 for tokens in answers[kv].values())
    if kv == "int8":  # the likeliest token of a random network stands far enough out for 8 bits
        assert answers[kv] == answers["whole"]


def test_sizes_and_settings():
    wide = dataclasses.replace(CONFIG, head_size=128)
    assert packed_bytes_per_token(wide, 8) == 2 * 2 * 2 * (128 + 2)
    assert packed_bytes_per_token(wide, 4) == 2 * 2 * 2 * (64 + 8)
    assert EngineConfig(kv="int4").bytes_per_token(wide, torch.bfloat16) * 3 < kv_bytes_per_token(wide)
    assert set(KV_BITS) == {"int8", "int4"}
    with pytest.raises(ConfigError, match="int8, int4"):
        EngineConfig(kv="fp8")
