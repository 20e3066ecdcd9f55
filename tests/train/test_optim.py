"""Optimisers against their formulas in float64; state that comes back bit for bit."""

import pytest
import torch
from torch import nn

from ernie45.errors import CheckpointError, ConfigError
from ernie45.train.optim import MovingAverage, Optimiser, OptimiserConfig, decays, is_hidden_matrix, matrix_rows, orthogonalised
from ernie45.train.step import LossConfig, Step
from tests.train.conftest import make_batch, make_decoder

RATE = 1e-2


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def adamw_twin(values, gradients, decay, config, rate=RATE):
    """AdamW by its paper, float64: decay on the weights, both means corrected for their start at 0."""
    value, mean, square = values.double(), 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        mean = config.beta1 * mean + (1 - config.beta1) * gradient.double()
        square = config.beta2 * square + (1 - config.beta2) * gradient.double() ** 2
        value = value * (1 - rate * decay)
        value = value - rate * (mean / (1 - config.beta1**t)) / ((square / (1 - config.beta2**t)).sqrt() + config.eps)
    return value


def test_adamw_is_its_formula_with_decay_on_matrices_only():
    model, config = make_decoder(), OptimiserConfig(clip=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser, gradients = Optimiser(model, config, 16), []
    for step in range(3):
        set_gradients(model, step)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimiser.step(RATE, optimiser.gradient_norm())
    for name, parameter in model.named_parameters():
        decay = config.weight_decay if parameter.ndim == 2 else 0.0
        expected = adamw_twin(before[name], [g[name] for g in gradients], decay, config)
        # float32 weights around 0.1 to 1, three roundings
        torch.testing.assert_close(parameter.detach().double(), expected, atol=3e-7, rtol=3e-7)


def test_routers_learn_slower_on_all_layers():
    model, config = make_decoder(experts=True), OptimiserConfig(clip=0.0, router_rate=0.01, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = Optimiser(model, config, 16)
    set_gradients(model, 0)
    optimiser.step(RATE, 1.0)
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    routers = [moved[name] for name in moved if name.endswith("router.weight")]
    assert len(routers) >= 2
    assert all(change == pytest.approx(RATE * 0.01, rel=1e-2) for change in routers)
    assert moved["layers.0.attn.qkv.weight"] == pytest.approx(RATE, rel=1e-2)
    assert all(moved[name] == 0 for name in moved if name.endswith("selection_bias"))


def test_clipping_scales_all_gradients_together():
    model = make_decoder()
    optimiser = Optimiser(model, OptimiserConfig(clip=1.0), 16)
    set_gradients(model, 0)
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm().item()
    norm = optimiser.gradient_norm()
    assert norm == pytest.approx(whole, rel=1e-5)
    kept = {name: p.grad for name, p in model.named_parameters()}
    optimiser.step(1e-9, norm)
    clipped = {name: optimiser.state()[f"mean/{name}"] / (1 - optimiser.config.beta1) for name in kept}  # the first mean is a share of it
    assert torch.cat([g.flatten() for g in clipped.values()]).norm().item() == pytest.approx(1.0, rel=1e-4)
    for name, gradient in kept.items():
        torch.testing.assert_close(clipped[name], gradient / whole, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (3, 12, 12)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.4  # the smallest of a square matrix is the slowest
    assert values.max() < 1.3


def test_orthogonalising_keeps_the_singular_vectors():
    matrix = torch.randn(6, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalised(matrix) @ vh.T
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-6


def test_muon_takes_the_hidden_matrices_head_by_head():
    model = make_decoder(experts=True)
    names = {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    assert "layers.0.attn.qkv.weight" in names
    assert any(name.endswith("experts.gate_up") for name in names)
    assert not any(word in name for name in names for word in ("embed", "norm", "router", "bias"))
    assert matrix_rows("layers.0.attn.qkv.weight", (64, 32), 16) == 16
    assert matrix_rows("layers.0.ffn.experts.gate_up", (4, 48, 32), 16) == 24
    assert matrix_rows("layers.0.attn.out.weight", (32, 64), 16) == 32


def test_a_muon_step_moves_each_head_by_an_orthogonal_matrix():
    model = make_decoder()
    config = OptimiserConfig(kind="muon", clip=0.0, weight_decay=0.0)
    optimiser = Optimiser(model, config, model.config.head_size)
    weight = model.layers[0].attn.qkv.weight
    before = weight.detach().clone()
    set_gradients(model, 0)
    gradient = weight.grad.double()
    optimiser.step(RATE, 1.0)
    rows = model.config.head_size
    u, _, vh = torch.linalg.svd(gradient[:rows], full_matrices=False)
    moved = (before - weight.detach())[:rows].double() / (RATE * 0.2 * max(rows, weight.shape[1]) ** 0.5)
    inner = (u.T @ moved @ vh.T).diag()
    assert inner.min() > 0.4
    assert inner.max() < 1.3


@pytest.mark.parametrize(("kind", "state"), [("adamw", "float32"), ("adamw", "bfloat16"), ("muon", "float32")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back_bit_for_bit(kind, state, dtype):
    def steps(model, optimiser, seeds):
        for seed in seeds:
            set_gradients(model, seed)
            optimiser.step(RATE, optimiser.gradient_norm())

    config = OptimiserConfig(kind=kind, state=state)
    one = make_decoder(experts=True).to(dtype)
    whole = Optimiser(one, config, 16)
    steps(one, whole, range(2))
    held = {name: tensor.clone() for name, tensor in whole.state().items()}
    two = make_decoder(experts=True, seed=9).to(dtype)
    two.load_state_dict(one.state_dict())
    resumed = Optimiser(two, config, 16)
    resumed.load_state(held, "here")
    steps(one, whole, range(2, 4))
    steps(two, resumed, range(2, 4))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bfloat16_learns_through_float32_masters():
    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    optimiser = Optimiser(model, OptimiserConfig(weight_decay=0.0, clip=0.0), 1)
    for _ in range(40):  # each step is 1e-4: far below the 2^-8 that bfloat16 can tell at 1
        model.weight.grad = torch.ones(4, 4, dtype=torch.bfloat16)
        optimiser.step(1e-4, 4.0)
    assert model.weight.float().mean().item() == pytest.approx(1 - 40e-4, abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_in_bfloat16_learn_like_those_in_float32(dtype):
    moved = {}
    for state in ("float32", "bfloat16"):
        model = nn.Linear(256, 64, bias=False).to(dtype)
        nn.init.constant_(model.weight, 1.0)
        # beta2 as near 1 as it is used: what one step changes in the mean square is a fifth of what bfloat16 can tell
        optimiser = Optimiser(model, OptimiserConfig(weight_decay=0.0, clip=0.0, beta2=0.999, state=state), 1)
        generator = torch.Generator().manual_seed(0)
        for step in range(60):  # large gradients first, then small ones: the mean square has to come down again
            model.weight.grad = (torch.randn(64, 256, generator=generator) * (1.0 if step < 30 else 0.2) + 0.1).to(dtype)
            optimiser.step(1e-3, 1.0)
        moved[state] = optimiser.master("weight") - 1.0
        square = optimiser.state()["square/weight"]
        assert square.dtype == getattr(torch, state)
        moved[state + " square"] = square.float().mean()
    assert moved["bfloat16 square"] == pytest.approx(moved["float32 square"].item(), rel=0.003)  # 16,384 roundings of 1/256 average out
    # one weight's path is off by single roundings of a 1/256 of its steps, some of which add up
    assert (moved["bfloat16"] - moved["float32"]).norm() < 0.01 * moved["float32"].norm()


def test_a_master_is_what_its_two_halves_say():
    model = nn.Linear(8, 8, bias=False).bfloat16()
    optimiser = Optimiser(model, OptimiserConfig(), 1)
    set_gradients(model, 0)
    optimiser.step(1e-3, optimiser.gradient_norm())
    master = optimiser.master("weight")
    assert master.dtype == torch.float32
    assert not torch.equal(master, model.weight.float())
    assert torch.equal(master.bfloat16(), model.weight)
    assert torch.equal(MovingAverage(optimiser, 100).weights["weight"], master)


def test_another_models_state_is_refused():
    optimiser = Optimiser(make_decoder(), OptimiserConfig(), 16)
    with pytest.raises(CheckpointError, match="another model or method"):
        optimiser.load_state({"mean/strange": torch.zeros(1)}, "here")
    with pytest.raises(CheckpointError, match="does not fit"):
        optimiser.load_state({"mean/norm.weight": torch.zeros(1)}, "here")


def test_nothing_to_train_is_said():
    model = make_decoder().requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        Optimiser(model, OptimiserConfig(), 16)


def test_decay_leaves_norms_and_biases_alone():
    model = make_decoder(experts=True)
    still = {name for name, p in model.named_parameters() if not decays(name, p)}
    assert still == {name for name, p in model.named_parameters() if p.ndim == 1}


def test_the_average_weighs_updates_by_their_age_in_tokens():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimiser = Optimiser(model, OptimiserConfig(), 1)
    average = MovingAverage(optimiser, window=100, residual=0.05)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(10):
        average.update(optimiser, 10)
    # the update is a whole window old: all of it but the residual has arrived
    assert average.weights["weight"].item() == pytest.approx(0.95, abs=1e-5)


def test_a_step_after_a_bad_gradient_is_refused_and_reported():
    model, batch = make_decoder(), make_batch()
    optimiser = Optimiser(model, OptimiserConfig(), 16)
    step = Step(model, optimiser, LossConfig())
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    report = step([batch], 0, RATE)
    assert report.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
