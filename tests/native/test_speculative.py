"""Drafts where steps are native: one of several rows is the single steps to the last bit, so not even a log probability moves."""

import pytest
import torch

from ernie45.engine.core import Engine, EngineConfig
from tests.engine.test_engine import ask, serve
from tests.engine.test_speculative import Oracle, eager
from tests.native.test_step import made, prompt

pytestmark = pytest.mark.native


def check(decoder, budget=30, **config):
    work = [
        ask(i, prompt(5 + 20 * i, i), max_tokens=24, temperature=0.8 * (i % 2), seed=i, logprobs=2, repetition_penalty=1.1)
        for i in range(4)
    ]
    plain = serve(Engine(decoder, EngineConfig(num_pages=64, **config)), work)
    for wrong in (10**9, 3):
        engine = eager(decoder, num_pages=16, page_size=16, token_budget=budget, **config)
        engine._runner._drafter = Oracle(plain, wrong)
        assert serve(engine, work) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "how",
    [{}, {"experts": True}, {"tied": False, "scheme": "w8a8"}, {"scheme": None}, {"scheme": None, "experts": True}],
    ids=["dense", "experts", "w8a8", "whole", "whole experts"],
)
def test_steps_in_one_call_do_not_move_a_bit(kernels, how, dtype):
    check(made(dtype=dtype, **how))


def test_a_packed_model_over_a_cache_of_bytes(kernels):
    check(made(dtype=torch.bfloat16), budget=512, kv="int8")  # prompts in one piece: there cuts move the last bits
