"""`ernie bench latency`, and the ceiling that it compares with."""

import json

import pytest
import torch

from ernie45 import ops
from ernie45.cli import main
from ernie45.models.load import load_model
from ernie45.models.random_weights import write_random
from ernie45.models.released import tiny
from ernie45.models.text import Decoder
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec
from ernie45.recipes.bench.ceiling import Footprint
from ernie45.recipes.bench.latency import time_run
from ernie45.recipes.bench.limits import Limits, measure_limits

LIMITS = Limits(cpu="x", threads=1, torch="2", kernels="none", read_gb_per_s=10, float32_gflops=100, bfloat16_gflops=200, int8_gops=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency") / "tiny"
    write_random(tiny(experts=True), folder, spec=QuantSpec.uniform("w4a8"), dtype=torch.float32, told=lambda *_: None)
    return folder


SMALL = ["--prompt-tokens", "12", "--output-tokens", "5", "--repeats", "2", "--threads", "1"]


def test_the_report_is_complete(folder, capsys, tmp_path):
    assert main(["bench", "latency", str(folder), "--batch", "3", "1", "--json", "--out", str(tmp_path / "r.json"), *SMALL]) == 0
    text = capsys.readouterr().out
    report = json.loads(text)
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert [result["batch"] for result in report["results"]] == [1, 3]
    for result in report["results"]:
        assert len(result["runs"]) == 2
        assert result["prefill_tokens_per_s"] == pytest.approx(result["batch"] * 12 / result["first_token_s"])
        assert result["decode_tokens_per_s"] == pytest.approx(result["batch"] / result["per_token_s"])
        for kind in ("prefill", "decode"):
            assert 0 < result[f"{kind}_share"] == pytest.approx(result[f"{kind}_tokens_per_s"] / result[f"{kind}_limit"])
        assert result["peak_bytes"] >= report["peak_bytes_loaded"] > report["weight_bytes"]
    assert report["load_s"] > 0
    assert report["cold_first_token_s"] > 0
    assert report["packed"]
    assert min(value for value in report["limits"].values() if isinstance(value, float)) > 0


def test_the_table_says_how_it_was_taken(folder, capsys):
    assert main(["bench", "latency", str(folder), "--warm-up", "0", "--skip-limits", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "medians of 2 runs after 0 to warm up" in text
    assert "packed" in text
    assert f"\n{ops.describe()}\n" in text
    assert "GB/s" not in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch", "0"], "--batch takes numbers"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--warm-up", "-1"], "--warm-up is -1"),
        (["--prompt-tokens", "5000"], "the model knows positions for 4096"),
        (["--out", "nowhere/r.json", *SMALL, "--skip-limits"], "cannot be written"),
    ],
)
def test_a_mistake_is_said(folder, capsys, arguments, says):
    assert main(["bench", "latency", str(folder), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_small_token_budget_mixes_reading_and_writing(folder):
    decoder = load_model(folder)
    timing = time_run(decoder, [[5] * 40, [6] * 40, [7] * 40], 6, token_budget=16)
    assert timing.first_token_s > 0
    assert timing.decode_s > 0


def test_the_ceiling_of_a_dense_model_is_its_bytes_and_products():
    decoder = Decoder(tiny())
    footprint = Footprint.of(decoder)
    assert footprint.always == sum(value.nbytes for value in decoder.state_dict().values())
    cache = 2 * 4 * 2 * 32 * 4  # keys and values, layers, heads, size, bytes
    assert footprint.step_bytes(2, 10) == footprint.always + 2 * 10 * cache
    assert footprint.decode_limit(LIMITS, 1, 10) == pytest.approx(10e9 / (footprint.always + 10 * cache))
    body = sum(value.numel() for name, value in decoder.state_dict().items() if not name.startswith("embed"))
    assert footprint.prefill_limit(LIMITS, 100) == pytest.approx(100e9 / (2 * body + 2 * 4 * 128 * 100), rel=1e-6)


def test_experts_are_read_as_chance_chooses_them(folder):
    footprint = Footprint.of(load_model(folder))
    assert footprint.packed
    one, many = footprint.step_bytes(1, 0), footprint.step_bytes(1000, 0)
    assert one == pytest.approx(footprint.always + footprint.routed * 2 / 8)
    assert many == pytest.approx(footprint.always + footprint.routed)
    # many sequences are bound by products and no longer by bytes
    assert footprint.decode_limit(LIMITS, 100_000, 1) < 100_000 * footprint.decode_limit(LIMITS, 1, 1)


def test_a_head_that_is_sketched_is_half_read_for_few_sequences(monkeypatch):
    decoder = Decoder(tiny()).initialise(torch.Generator().manual_seed(0))
    quantise_model(decoder, QuantSpec.uniform("w4a8-g64", head="w8a8-g64"))
    head = decoder.embed.weight_packed.nbytes
    monkeypatch.setattr(ops, "KERNELS", object())
    footprint = Footprint.of(decoder)
    assert footprint.step_bytes(8, 0) == footprint.always - head // 2
    assert footprint.step_bytes(9, 0) == footprint.always
    monkeypatch.setattr(ops, "KERNELS", None)
    assert Footprint.of(decoder).step_bytes(1, 0) == footprint.always


def test_the_limits_of_this_machine_are_positive_and_repeatable():
    limits = measure_limits(1, repeats=1)
    assert min(limits.read_gb_per_s, limits.float32_gflops, limits.bfloat16_gflops, limits.int8_gops) > 0
    assert limits.cpu
