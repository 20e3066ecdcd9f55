"""`ernie quantize`: the report, the limit, a real kill, and what is said about mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ernie45.cli import main
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.config import TextConfig
from ernie45.models.load import load_model
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.recipes.quantize import PICTURE, REPORT, QuantizeConfig, quantize, run, spec_of
from ernie45.recipes.texts import built_in_text

SPECIAL = ["<unk>", "<s>", "</s>"]
SMALL = {"calibration_tokens": 512, "held_out_tokens": 256, "window": 64, "group": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that reads any bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made") / "tiny"
    config = TextConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, ffn_size=96, vocab_size=259)
    save_model(Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.1), folder)
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    yield folder
    torch.set_num_threads(before)


def test_a_folder_with_a_report_and_a_picture(folder, tmp_path, environment, capsys) -> None:
    out = tmp_path / "small"
    assert run(QuantizeConfig(model=str(folder), out=out, report=tmp_path / "report.json", **SMALL), environment) == 0
    shown = capsys.readouterr().out
    report = json.loads((out / REPORT).read_text())
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert f"{report['quality']['perplexity_after']:.4f}" in shown
    assert report["worst"][0]["name"] in shown
    assert report["quality"]["tokens"] == 4 * 63
    assert report["calibration"]["tokens"] == 512
    assert report["bytes"] < report["bytes_before"] / 2
    # a random model predicts nothing, so rounding may move its perplexity either way; that it moved shows in the divergence
    assert 0.9 < report["ratio"] < 1.1
    assert report["quality"]["divergence"] > 0
    svg = (out / PICTURE).read_text()
    assert svg.startswith("<svg")
    assert svg.count("<polyline") == 5
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= {path.name for path in out.iterdir()}
    assert load_model(out).prompt_logits([5, 6, 7]).isfinite().all()


def test_past_the_limit_nothing_is_written(folder, tmp_path, environment, capsys) -> None:
    out = tmp_path / "small"
    config = QuantizeConfig(model=str(folder), out=out, limit=0.5, method="rtn", report=tmp_path / "report.json", **SMALL)
    assert run(config, environment) == 1
    said = capsys.readouterr()
    quality = json.loads((tmp_path / "report.json").read_text())["quality"]
    assert f"{quality['perplexity_before']:.4f} became {quality['perplexity_after']:.4f}" in said.err
    assert "worst matrices" in said.out
    assert {path.name for path in tmp_path.iterdir()} == {"report.json"}


@pytest.mark.parametrize(("target", "bits"), [({"target_bits": 6.0}, 6.0), ({"target_size": "68kB"}, None)])
def test_a_budget_is_kept_and_used(folder, tmp_path, environment, target, bits) -> None:
    out = tmp_path / "small"
    report = quantize(QuantizeConfig(model=str(folder), out=out, limit=2.0, **target, **SMALL), environment)
    chosen = {matrix["name"]: matrix["scheme"] for layer in report["layers"] for matrix in layer["matrices"]}
    assert set(chosen.values()) == {"w4a8-g32-h", "w8a8-g32-h"}
    if bits is None:
        assert 60_000 < report["bytes"] <= 68_000
    else:
        sizes = {"attn.qkv": 128 * 64, "attn.out": 64 * 64, "ffn.gate_up": 192 * 64, "ffn.down": 64 * 96}
        used = [(sizes[name.split(".", 2)[2]], int(scheme[1]) + 0.5) for name, scheme in chosen.items()]
        assert 5.0 < sum(a * b for a, b in used) / sum(a for a, _ in used) <= bits
    assert load_model(out).prompt_logits([5, 6, 7]).isfinite().all()


@pytest.mark.slow
def test_kill_9_and_on(folder, tmp_path, environment) -> None:
    """The process is killed while it works; the same command ends with the bytes of a run that was left alone."""
    args = ["quantize", str(folder), "--group", "32", "--calibration-tokens", "4096", "--held-out-tokens", "256", "--window", "64", "--out"]
    state = tmp_path / ".killed.quantising" / "state.json"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ERNIE45_CACHE": str(environment.cache_dir)}
    process = subprocess.Popen([sys.executable, "-m", "ernie45", *args, str(tmp_path / "killed")], env=env, stdout=subprocess.DEVNULL)
    for _ in range(6000):
        if state.is_file() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert main([*args, str(tmp_path / "killed")]) == 0
    assert main([*args, str(tmp_path / "calm")]) == 0
    reports = [json.loads((tmp_path / name / REPORT).read_text()) for name in ("killed", "calm")]
    assert reports[0].pop("resumed_at_layer") in (1, 2)
    assert reports[1].pop("resumed_at_layer") == 0
    assert reports[0] == reports[1]
    for path in (tmp_path / "calm").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scheme": "w3a8"}, "no quantisation scheme|not a quantisation scheme"),
        ({"target_bits": 3.0}, r"3\.000 bits.*need 4\.5"),
        ({"group": 48}, "not a quantisation scheme"),
        ({"rule": ("layers.0.*",)}, "PATTERN=SCHEME"),
        ({"rule": ("layers.9.*=w8a8",)}, "fits no module"),
        ({"calibration_tokens": 10_000_000}, r"has [\d,]+ tokens, [\d,]+ are asked for"),
        ({"held_out_tokens": 63}, "make no window of 64"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(folder, tmp_path, environment, changes, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        quantize(QuantizeConfig(model=str(folder), out=tmp_path / "small", **{**SMALL, **changes}), environment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"limit": 0.0},
        {"target_size": "11 elephants"},
        {"target_bits": 5.0, "method": "rtn"},
        {"limit": float("nan")},
        {"window": 1},
        {"calibration_tokens": 0},
    ],
)
def test_settings_that_mean_nothing(changes) -> None:
    with pytest.raises(ConfigError):
        QuantizeConfig(model="starter", out="x", **changes)


def test_text_files(folder, tmp_path, environment) -> None:
    text = tmp_path / "text.txt"
    for content, said in ((b"", "is empty"), (b"a\xff\xfe", "not UTF-8 at byte 1"), (b"too short", r"has 9 tokens, 512 are asked for")):
        text.write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            quantize(QuantizeConfig(model=str(folder), out=tmp_path / "small", calibration=text, **SMALL), environment)
    with pytest.raises(ConfigError, match="cannot be read"):
        quantize(QuantizeConfig(model=str(folder), out=tmp_path / "small", held_out=tmp_path / "none", **SMALL), environment)


def test_what_is_quantised_or_there_already(folder, tmp_path, environment) -> None:
    out = tmp_path / "small"
    quantize(QuantizeConfig(model=str(folder), out=out, method="rtn", limit=2.0, **SMALL), environment)
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize(QuantizeConfig(model=str(out), out=tmp_path / "again", method="rtn", **SMALL), environment)
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        quantize(QuantizeConfig(model=str(folder), out=out, method="rtn", **SMALL), environment)


def test_the_built_in_texts_share_nothing() -> None:
    held_out, calibration = built_in_text(held_out=True).text, built_in_text(held_out=False).text
    assert len(calibration) > 2.5 * len(held_out) > 100_000
    # help topics repeat whole sections of one another; what the held-out ones have is taken out of the others
    paragraphs = {" ".join(part.split()) for part in held_out.split("\n\n")}
    assert not paragraphs & {" ".join(part.split()) for part in calibration.split("\n\n")}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"method": "awq+gptq"}, "take gptq or rtn"),
        ({"target_bits": 3.0}, "choose between 4 and 8 bits"),
        ({"scheme": "ccq2.07"}, "is not a quantisation scheme"),
    ],
)
def test_what_codes_do_not_go_together_with(tmp_path, flags, complaint) -> None:
    with pytest.raises(ConfigError, match=complaint):
        spec_of(QuantizeConfig(**{"model": "any", "out": tmp_path / "none", "scheme": "tcq2.06", **flags}), tied=True)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_coded_folder_is_written_and_loads(folder, tmp_path, environment, method) -> None:
    out = tmp_path / "coded"
    report = quantize(QuantizeConfig(model=str(folder), out=out, scheme="tcq2.06", method=method, limit=5, **SMALL), environment)
    assert report["within_limit"]
    assert report["spec"]["rules"][-1]["scheme"] == "tcq2.06-h"
    assert report["worst"][0]["nearest_error"] is None
    loaded = load_model(out)
    assert loaded.layers[0].attn.qkv.scheme.code == "tcq2.06"
    tokens = list(range(40, 70))
    drift = (loaded.prompt_logits(tokens) - load_model(folder).prompt_logits(tokens)).square().mean()
    assert 0 < float(drift) < float(load_model(folder).prompt_logits(tokens).square().mean())
