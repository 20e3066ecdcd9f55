"""The decoder as a whole: packing, prefixes, the MTP block, bad prompts. Parity with transformers stands in tests/parity."""

from dataclasses import replace

import pytest
import torch

from ernie45.errors import RequestError
from ernie45.models.released import tiny
from ernie45.models.text import Decoder
from ernie45.nn.attention import PackedCausal

CLOSE = {"atol": 2e-5, "rtol": 2e-5}  # float32, other order of sums, logits around 1


def _decoder(config, seed=0):
    return Decoder(config).initialise(torch.Generator().manual_seed(seed), std=0.15).eval()


@pytest.mark.parametrize("experts", [False, True])
@torch.inference_mode()
def test_packed_documents_equal_separate_ones(experts):
    model = _decoder(tiny(experts=experts))
    docs = [torch.randint(0, 512, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 12)]
    ends = [5, 6, 18]
    tokens, positions = torch.cat(docs), torch.cat([torch.arange(len(d)) for d in docs])
    packed = model.logits(model(model.embed(tokens), positions, PackedCausal(ends)))
    for doc, part in zip(docs, packed.split([5, 1, 12]), strict=True):
        torch.testing.assert_close(part, model.prompt_logits(doc.tolist()), **CLOSE)


@pytest.mark.parametrize("experts", [False, True])
def test_a_later_token_changes_nothing_before_it(experts):
    model = _decoder(tiny(experts=experts))
    tokens = list(range(20, 40))
    whole, shorter = model.prompt_logits(tokens), model.prompt_logits(tokens[:-5])
    assert whole.dtype == torch.float32
    assert whole.shape == (20, 512)
    torch.testing.assert_close(whole[:15], shorter, **CLOSE)


def _norm64(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _mtp_twin(model, next_tokens, hidden, positions):
    """The MTP block in float64, written from the published formula alone: dense block, adjacent-pair rotary, causal attention."""
    c, p = model.config, {name: t.double() for name, t in model.named_parameters()}
    both = torch.cat(
        (
            _norm64(p["embed.weight"][next_tokens], p["mtp.embed_norm.weight"], c.norm_eps),
            _norm64(hidden.double(), p["mtp.hidden_norm.weight"], c.norm_eps),
        ),
        -1,
    )
    x = both @ p["mtp.project.weight"].T
    n, k, h, block = c.num_heads, c.num_kv_heads, c.head_size, "mtp.block."
    qkv = (_norm64(x, p[block + "attn_norm.weight"], c.norm_eps) @ p[block + "attn.qkv.weight"].T).unflatten(-1, (n + 2 * k, h))
    angle = positions.double()[:, None] * c.rope_theta ** (-torch.arange(0, h, 2).double() / h)
    pairs = torch.view_as_complex(qkv[:, : n + k].unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None]
    qk = torch.view_as_real(pairs).flatten(-2)
    keys, values = qk[:, n:].repeat_interleave(n // k, 1), qkv[:, n + k :].repeat_interleave(n // k, 1)
    scores = torch.einsum("tnh,snh->nts", qk[:, :n], keys) / h**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(-1)
    seen = torch.einsum("nts,snh->tnh", scores, values).flatten(1)
    x = x + seen @ p[block + "attn.out.weight"].T
    gate, up = (_norm64(x, p[block + "ffn_norm.weight"], c.norm_eps) @ p[block + "ffn.gate_up.weight"].T).chunk(2, -1)
    x = x + (gate * gate.sigmoid() * up) @ p[block + "ffn.down.weight"].T
    head = p["embed.weight"] if c.tie_embeddings else p["head.weight"]
    return _norm64(x, p["norm.weight"], c.norm_eps) @ head.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [False, True])
@torch.inference_mode()
def test_mtp_equals_an_independent_twin(experts, tied):
    model = _decoder(replace(tiny(experts=experts, num_mtp=1), tie_embeddings=tied))
    for name, parameter in model.named_parameters():  # norms that are not 1, so that a swapped norm shows
        if name.endswith("norm.weight"):
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    tokens = torch.randint(0, 512, (11,), generator=torch.Generator().manual_seed(3))
    hidden = model(model.embed(tokens), torch.arange(11), PackedCausal([11]))[:-1]
    positions = torch.arange(1, 11)
    state = model.predict_after_next(tokens[1:], hidden, positions, PackedCausal([10]))
    got = model.logits(state)
    want = _mtp_twin(model, tokens[1:], hidden, positions)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)  # float32 against float64, logits up to 10


def test_mtp_attention_has_a_layer_number_of_its_own():
    model = Decoder(tiny(num_mtp=1))
    assert model.mtp is not None
    assert model.mtp.block.attn.layer == len(model.layers)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([], "empty"), ([1, 512], "512 at place 1"), ([-1], "-1"), ([0] * 4097, "4097 tokens.*4096")],
)
def test_a_bad_prompt_is_answered(tokens, words):
    with pytest.raises(RequestError, match=words) as error:
        Decoder(tiny()).prompt_logits(tokens)
    assert error.value.field == "prompt"


def test_the_router_stays_float32_in_a_bfloat16_model():
    with torch.device("meta"):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Decoder(tiny(experts=True))
        finally:
            torch.set_default_dtype(previous)
    assert model.dtype == torch.bfloat16
    router = model.layers[1].ffn.router
    assert router.weight.dtype == router.selection_bias.dtype == torch.float32
