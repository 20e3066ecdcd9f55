"""Learning beside a packed base: the same numbers as beside the floats it stands for, without those floats in memory."""

import pytest
import torch

from ernie45 import ops
from ernie45.models.released import tiny
from ernie45.models.text import Decoder
from ernie45.nn.attention import PackedCausal
from ernie45.nn.lora import LoraConfig, adapt, adapters, merge
from ernie45.quant.frozen import FrozenExperts, FrozenLinear, freeze, thaw, unpack_model
from ernie45.quant.model import quantise_model
from ernie45.quant.rtn import round_to_nearest
from ernie45.quant.spec import QuantSpec, Scheme
from ernie45.train.batch import pack
from ernie45.train.cross_entropy import summed_cross_entropy, token_log_probs
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_examples

TOKENS = [5, 9, 77, 300, 12, 8, 41]
SCHEMES = ["w4a8-g32", "w4a8-g64-h", "w8a8", "w8a8-g64-h"]
SCHEME = Scheme.parse("w8a8-g64-h")
# float32, other order of sums
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def packed_decoder(scheme, **how):
    """A tiny model, packed throughout, head and embedding too."""
    decoder = Decoder(tiny(**how)).initialise(torch.Generator().manual_seed(0), std=0.1)
    quantise_model(decoder, QuantSpec.uniform(scheme))
    return decoder


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("out_size", "in_size"), [(48, 128), (37, 70), (1, 32)])
def test_products_and_gradients_are_those_of_the_floats(monkeypatch, scheme, out_size, in_size):
    monkeypatch.setattr("ernie45.ops.packed_dense._AT_ONCE", 16 * 128)  # several blocks
    generator = torch.Generator().manual_seed(out_size)
    weight = round_to_nearest(torch.randn(out_size, in_size, generator=generator), Scheme.parse(scheme))
    floats_OI = ops.dense(weight, in_size)
    x_TI, pull_TO = torch.randn(5, in_size, generator=generator), torch.randn(5, out_size, generator=generator)
    ours, theirs = x_TI.clone().requires_grad_(), x_TI.clone().requires_grad_()
    product, expected = ops.dense_linear(ours, weight), theirs @ floats_OI.t()
    product.backward(pull_TO)
    expected.backward(pull_TO)
    torch.testing.assert_close(product, expected, **CLOSE)
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("scheme", ["w4a8-g32-h", "w8a8"])
def test_cross_entropy_over_a_packed_head(scheme):
    generator = torch.Generator().manual_seed(0)
    head = round_to_nearest(torch.randn(50, 64, generator=generator), Scheme.parse(scheme))
    labels_T = torch.tensor([3, -100, 49, 7])
    for kind in ("summed", "each"):
        grads = []
        for weight in (head, ops.dense(head, 64)):
            h_TD = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
            if kind == "summed":
                summed_cross_entropy(h_TD, weight, labels_T, torch.tensor([0.5, 1, 1, 2]), chunk_elements=100).total.backward()
            else:
                (token_log_probs(h_TD, weight, labels_T, chunk_elements=100) * torch.arange(4)).sum().backward()
            grads.append(h_TD.grad)
        torch.testing.assert_close(*grads, **CLOSE)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("scheme", "experts"), [("w4a8-g64-h", False), ("w4a8-g32", True), ("w8a8", False)])
def test_learning_is_that_of_adapters_beside_the_floats(scheme, experts, dora):
    runs = []
    for packed in (True, False):
        decoder = packed_decoder(scheme, experts=experts)
        if packed:
            assert freeze(decoder)
        else:
            unpack_model(decoder, torch.float32)
        decoder.requires_grad_(False)
        adapt(decoder.layers, LoraConfig(rank=3, dora=dora), torch.Generator().manual_seed(0))
        step = Step(decoder, Optimiser(decoder, OptimiserConfig(), 16), LossConfig())
        examples = make_examples([5, 9, 14, 7], seed=3)
        runs.append([(report.loss, report.norm) for report in (step([pack(examples)], n, 3e-3) for n in range(4))])
    (first, *_), (last, *_) = runs[0][0], runs[0][-1]
    assert first - last > 0.1
    for ours, theirs in zip(*runs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_no_float_copy_of_the_base_is_kept():
    decoder = packed_decoder("w4a8-g64-h", experts=True)
    freeze(decoder)
    adapt(decoder.requires_grad_(False).layers, LoraConfig(rank=2, dora=True), torch.Generator().manual_seed(0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        x_TD = decoder.embed(torch.tensor(TOKENS))
        h_TD = decoder(x_TD, torch.arange(len(TOKENS)), PackedCausal([len(TOKENS)]))
    assert h_TD.requires_grad
    assert kept
    # the smallest matrix of the base has 32 x 64 numbers; rows of seven tokens, doubled where two experts take them, have fewer
    assert max(tensor.numel() for tensor in kept) < 32 * 64
    assert not any(name.endswith("weight") and p.dim() > 1 and "router" not in name for name, p in decoder.named_parameters())


@pytest.mark.parametrize("experts", [False, True])
def test_merging_rounds_once_and_thawing_gives_a_served_model_back(experts):
    decoder = packed_decoder(str(SCHEME), experts=experts)
    names = set(decoder.state_dict())
    before = decoder.prompt_logits(TOKENS)
    freeze(decoder)
    adapt(decoder.layers, LoraConfig(rank=3), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("adapter_b"):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    with_adapters = decoder.prompt_logits(TOKENS)
    layer = decoder.layers[0].attn.out
    expected = round_to_nearest(ops.dense(layer.base.weight, layer.base.in_size) + layer.scale * layer.adapter_b @ layer.adapter_a, SCHEME)
    merge(decoder)
    found = decoder.layers[0].attn.out.weight
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.scales, expected.scales)
    assert not adapters(decoder)
    assert any(isinstance(m, FrozenLinear) for m in decoder.modules())
    assert any(isinstance(m, FrozenExperts) for m in decoder.modules()) == experts
    # rounding a matrix to 8 bits loses far less than an adapter brings
    brought = (with_adapters - before).abs().mean()
    assert (decoder.prompt_logits(TOKENS) - with_adapters).abs().mean() < 0.05 * brought
    thaw(decoder)
    assert set(decoder.state_dict()) == names
    assert (decoder.prompt_logits(TOKENS) - with_adapters).abs().mean() < 0.1 * brought
