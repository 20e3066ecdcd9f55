"""GPTQ against its textbook form in float64, and the promises of the roundings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.quant.gptq import (
    GptqSettings,
    Rounded,
    descended,
    fitted_scales,
    gptq,
    largest_whole,
    output_errors,
    restored,
    round_to_nearest,
    smallest_whole,
    spread,
    to_nearest,
    weighted_scales,
)


def made(rows: int, inputs: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with heavy tails and correlated inputs of very different energy, as real layers have them: (weight, inputs)."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random) * torch.linspace(0.05, 1, inputs)
    weight = torch.randn(rows, inputs, generator=random) * torch.rand(rows, 1, generator=random)
    weight[0, 0] = 9.0
    return weight, torch.randn(tokens, inputs, generator=random) @ mixing


def textbook(weight: torch.Tensor, gram: torch.Tensor, scales: torch.Tensor, order: list[int], damping: float, bits: int) -> torch.Tensor:
    """Optimal brain quantisation in float64: the inverse of H is shrunk by each column that is done. No factor, no blocks."""
    rest = weight.double().clone()
    inverse = torch.linalg.inv(gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
    whole = torch.zeros_like(rest)
    for place, column in enumerate(order):
        later = order[place + 1 :]
        whole[:, column] = (rest[:, column] / scales[:, column]).round().clamp(smallest_whole(bits), largest_whole(bits))
        error = (rest[:, column] - whole[:, column] * scales[:, column]) / inverse[column, column]
        rest[:, later] -= error[:, None] * inverse[column, later]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column, :]) / inverse[column, column]
    return whole


@pytest.mark.parametrize("by_energy", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_textbook_form_rounds_the_same_way(bits: int, by_energy: bool) -> None:
    weight, inputs = made(24, 160, 600, 1)  # more columns than one block of updates
    gram = inputs.t() @ inputs
    settings = GptqSettings(rounds=1, descents=0, by_energy=by_energy)
    found = gptq(weight, gram, bits, 32, settings)
    order = gram.diagonal().double().argsort(descending=True, stable=True).tolist() if by_energy else list(range(160))
    wanted = textbook(weight, gram, spread(found.scales_OG, 160, 32).double(), order, settings.damping, bits)
    # one value on the border between two whole numbers may fall either way in float32, and those after it in its row follow
    assert (found.whole_OI.double() == wanted).float().mean() > 0.97
    lost = weight.double() - wanted * spread(found.scales_OG, 160, 32).double()
    textbook_error = float(((lost @ gram.double()) * lost).sum())
    assert found.error == pytest.approx(textbook_error, rel=0.02)


def test_outputs_lose_far_less_than_by_rounding_to_nearest() -> None:
    weight, inputs = made(48, 192, 2000, 2)
    gram = inputs.t() @ inputs
    nearest = round_to_nearest(weight, gram, 4, 64)
    spread_out = gptq(weight, gram, 4, 64, GptqSettings())
    assert spread_out.error < 0.5 * nearest.error
    # and on inputs it has not seen
    _, fresh = (
        made(48, 192, 2000, 2)[0],
        torch.randn(500, 192, generator=torch.Generator().manual_seed(9)) @ torch.linalg.cholesky(gram / 2000 + 1e-6 * torch.eye(192)).t(),
    )
    lost = [((weight - restored(found, 64)) @ fresh.t()).square().sum() for found in (spread_out, nearest)]
    assert lost[0] < 0.6 * lost[1]


def test_error_is_what_the_outputs_really_lose() -> None:
    weight, inputs = made(16, 96, 300, 3)
    for found in (round_to_nearest(weight, inputs.t() @ inputs, 4, 32), gptq(weight, inputs.t() @ inputs, 4, 32, GptqSettings())):
        real = ((weight - restored(found, 32)).double() @ inputs.double().t()).square().sum()
        assert found.error == pytest.approx(float(real), rel=1e-3)


def test_more_rounds_never_lose_more() -> None:
    weight, inputs = made(32, 128, 400, 4)
    errors = [gptq(weight, inputs.t() @ inputs, 4, 32, GptqSettings(rounds=n)).error for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


def test_fitted_scales_are_a_stationary_point() -> None:
    weight, inputs = made(8, 96, 300, 5)
    gram = inputs.t() @ inputs
    scales = weighted_scales(weight, torch.ones(96), 4, 32)
    whole = to_nearest(weight, scales, 4, 32)
    fitted = fitted_scales(weight, whole, scales, gram, 32)

    def error(s: torch.Tensor) -> torch.Tensor:
        return output_errors(weight.double() - whole.double() * spread(s.double(), 96, 32), gram.double())

    best = error(fitted)
    for group in range(3):
        for factor in (0.99, 1.01):
            moved = fitted.clone()
            moved[:, group] *= factor
            assert (error(moved) >= best * 0.9999).all()


@given(
    rows=st.integers(1, 20), inputs=st.integers(1, 150), tokens=st.integers(1, 40), bits=st.sampled_from([4, 8]),
    group=st.sampled_from([0, 32, 64]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_odd_shapes_and_few_tokens(rows: int, inputs: int, tokens: int, bits: int, group: int, seed: int) -> None:
    weight, x = made(rows, inputs, tokens, seed)  # with fewer tokens than inputs H has no inverse of its own
    x[:, inputs // 2 :: 3] = 0  # inputs that never occur
    gram = x.t() @ x
    found = gptq(weight, gram, bits, group, GptqSettings(rounds=2))
    assert found.whole_OI.shape == weight.shape
    assert smallest_whole(bits) <= int(found.whole_OI.min()) <= int(found.whole_OI.max()) <= largest_whole(bits)
    assert bool((found.scales_OG != 0).all())
    assert torch.equal(found.scales_OG.to(torch.float16).float(), found.scales_OG)
    assert found.error <= round_to_nearest(weight, gram, bits, group).error * 1.001 + 1e-4


def test_a_matrix_of_zeros_stays_one() -> None:
    found = gptq(torch.zeros(4, 64), torch.eye(64), 4, 32, GptqSettings())
    assert not restored(found, 32).any()
    assert found.error == 0


def test_exact_values_are_kept() -> None:
    whole = torch.randint(-7, 8, (16, 128), generator=torch.Generator().manual_seed(6), dtype=torch.int8)
    whole[:, ::32] = 7
    weight = restored(Rounded(whole, torch.full((16, 4), 0.125), 0.0), 32)
    found = gptq(weight, torch.eye(128), 4, 32, GptqSettings())
    assert torch.equal(restored(found, 32), weight)


def test_descent_ends_where_no_whole_number_can_move_alone() -> None:
    weight, inputs = made(12, 150, 400, 7)  # more than one block of columns
    gram = inputs.t() @ inputs
    scales = weighted_scales(weight, gram.diagonal(), 4, 32)
    whole = to_nearest(weight, scales, 4, 32)

    def errors(numbers: torch.Tensor) -> torch.Tensor:
        return output_errors(weight.double() - numbers.double() * spread(scales, 150, 32).double(), gram.double())

    before = first = errors(whole)
    for _ in range(60):
        moved = descended(weight, whole, scales, gram, 4, 32)
        assert (errors(moved) <= before * (1 + 1e-5)).all()
        before, whole, same = errors(moved), moved, torch.equal(moved, whole)
        if same:
            break
    assert same
    assert float(before.sum()) < 0.5 * float(first.sum())
    for column in range(0, 150, 7):
        for step in (-1, 1):
            other = whole.clone()
            other[:, column] = (other[:, column] + step).clamp(smallest_whole(4), largest_whole(4))
            assert (errors(other) >= before * (1 - 1e-5)).all()


def test_gptq_gains_by_descent() -> None:
    weight, inputs = made(48, 192, 2000, 2)
    gram = inputs.t() @ inputs
    without, with_it = (gptq(weight, gram, 4, 64, GptqSettings(descents=count)).error for count in (0, 2))
    assert with_it < 0.97 * without
