"""`ernie sft`, `align` and `pretrain` as people use them: from rows in a file to a model that loads everywhere."""

import json
import re
import struct

import pytest
import torch
from tensorboardX.proto import event_pb2
from transformers import AutoModelForCausalLM

from ernie45.cli import main
from ernie45.config import Environment
from ernie45.engine.client import LLM
from ernie45.engine.request import SamplingParams
from ernie45.errors import CheckpointError, ConfigError, DataError, RunError
from ernie45.models.adapters import load_adapter
from ernie45.models.load import load, load_model
from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.recipes.learning import open_pupil, plan_text
from ernie45.train.preference import as_pair, make_each
from ernie45.train.records import read_records
from ernie45.train.reward import load_reward_model
from tests.recipes.lessons import COMMON, Stop, ernie, losses, stop_at

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rank", [0, 4])
def test_sft_learns_and_its_model_loads_everywhere(model, rows, tmp_path, rank, capsys):
    out = tmp_path / "run"
    assert ernie("sft", model, "--data", rows, "--out", out, "--lora.rank", rank, *COMMON) == 0
    assert "of which" in capsys.readouterr().out
    seen = losses(out)
    assert sum(seen[-2:]) < 0.8 * sum(seen[:2])
    assert json.loads((out / "settings.json").read_text())["lora"]["rank"] == rank
    ids = [5, 90, 200, 17]
    decoder = load_model(out / "model")
    ours = decoder.prompt_logits(ids)
    theirs = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    with torch.no_grad():
        # float32, other order of sums, logits up to 10
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits[0], atol=2e-4, rtol=1e-4)
    assert (out / "model" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert "Fine-tuned" in (out / "model" / "README.md").read_text()
    assert (out / "adapter").exists() == bool(rank)
    if rank:
        base = load_model(model)
        load_adapter(base, out / "adapter")
        torch.testing.assert_close(base.prompt_logits(ids), ours, atol=2e-4, rtol=1e-4)


def written_events(folder):
    """(step, tag, value) of every TensorBoard event: records are a length, its check, the bytes, their check."""
    (path,) = folder.glob("events.*")
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        at += length + 16
    return found


def test_a_run_leaves_samples_and_events(model, rows, tmp_path):
    """The texts are those of the weights at that step: the last ones are what the finished model says."""
    out = tmp_path / "run"
    ask = ["--samples", "What is up?", "Hi", "--sample-tokens", "6", "--tensorboard", "--save-every", "3"]
    ernie("sft", model, "--data", rows, "--out", out, "--lora.rank", 4, *COMMON, *ask)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    steps = json.loads((out / "plan.json").read_text())["steps"]
    assert [(row["step"], row["prompt"]) for row in samples][-2:] == [(steps, "What is up?"), (steps, "Hi")]
    assert len(samples) == 2 * -(-steps // 3)
    llm = LLM(out / "model", dtype="float32")
    assert [llm.chat(row["prompt"], SamplingParams(max_tokens=6, temperature=0.0)).text for row in samples[-2:]] == [
        row["text"] for row in samples[-2:]
    ]
    seen = {(step, tag): value for step, tag, value in written_events(out / "tensorboard")}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [seen[row["step"], "loss/loss"] for row in log] == pytest.approx([row["loss"] for row in log], rel=1e-6)
    assert ((0, "load/0") in seen) == ("load" in log[0])


def test_align_raises_the_margin_of_the_better_answer(model, pairs, tmp_path):
    for rank in (0, 4):
        out = tmp_path / f"run-{rank}"
        ernie("align", model, "--data", pairs, "--out", out, "--lora.rank", rank, *COMMON)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        assert lines[-1]["loss"] < 0.5
        assert lines[-1]["margin"] > 0.3
        load_model(out / "model")


def test_single_judged_answers_are_learned_from(model, tmp_path, capsys):
    rows = [{"prompt": f"Say {word}", "completion": f"{word}!", "label": word != "no"} for word in ("yes", "no", "up", "down")]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert ernie("data", "check", path, "--model", model) == 0
    ernie("align", model, "--data", path, "--out", tmp_path / "run", "--preference.loss", "kto", *COMMON)
    assert "answers" in capsys.readouterr().out
    assert losses(tmp_path / "run")[0] == pytest.approx(0.5, abs=1e-3)
    assert losses(tmp_path / "run")[-1] < 0.4
    with pytest.raises(DataError, match="no preference pair"):
        ernie("align", model, "--data", path, "--out", tmp_path / "pairs")


@pytest.mark.parametrize("rank", [0, 4])
def test_a_reward_model_prefers_what_it_was_taught(model, pairs, tmp_path, rank, capsys):
    out = tmp_path / "run"
    ernie("align", model, "--data", pairs, "--out", out, "--preference.loss", "reward", "--lora.rank", rank, *COMMON)
    assert capsys.readouterr().out.endswith("it judges answers: ernie45.train.reward.load_reward_model\n")
    seen = losses(out)
    assert seen[0] > 0.5
    assert seen[-1] < 0.2
    judge = load_reward_model(out / "model")
    pupil = open_pupil(str(model), "auto", Environment.read())
    [pair] = make_each(list(read_records([pairs]))[:1], lambda record: [as_pair(record, pupil.template(None))], 128)
    good, bad = judge.score([[*pair.prefix, *pair.chosen], [*pair.prefix, *pair.rejected]]).tolist()
    assert good > bad + 1


def test_a_lesson_through_the_rounding_gives_a_quantised_model(model, rows, tmp_path):
    out = tmp_path / "run"
    ernie("sft", model, "--data", rows, "--out", out, "--lora.rank", 0, "--qat", "w4a8", *COMMON)
    seen = losses(out)
    assert sum(seen[-2:]) < 0.8 * sum(seen[:2])
    loaded = load(out / "model")
    assert [rule.scheme for rule in loaded.opened.spec.rules] == ["w8a8-g64-h", "w4a8-g64-h"]
    assert LLM(out / "model").chat("What is up?", SamplingParams(max_tokens=4)).text is not None
    for words, says in (((), "add --lora.rank 0"), (("--lora.rank", 0, "--qat-head", "w3"), "no.* quantisation scheme")):
        with pytest.raises(ConfigError, match=says):
            ernie("sft", model, "--data", rows, "--out", tmp_path / "other", "--qat", "w4a8", *words)


def test_a_lesson_through_fp8_rounding_gives_an_fp8_model(model, rows, tmp_path):
    out = tmp_path / "run"
    word = "fp8-tensor-static-h"
    ernie("sft", model, "--data", rows, "--out", out, "--lora.rank", 0, "--qat", word, "--qat-online", 4, *COMMON)
    seen = losses(out)
    assert sum(seen[-2:]) < 0.8 * sum(seen[:2])
    assert [rule.scheme for rule in load(out / "model").opened.spec.rules] == ["w8a8-g64-h", word]
    assert LLM(out / "model").chat("What is up?", SamplingParams(max_tokens=4)).text is not None
    words = ("sft", model, "--data", rows, "--out", tmp_path / "other", "--lora.rank", 0, "--qat", word)
    with pytest.raises(ConfigError, match="qat_online must be"):
        ernie(*words, "--qat-online", -1)


def test_a_lesson_in_fp8_learns_as_one_without(model, rows, pairs, tmp_path):
    """All products of the feed-forward are of E4M3 numbers; what is written is a plain model."""
    plain, fp8 = tmp_path / "plain", tmp_path / "fp8"
    words = ("sft", model, "--data", rows, "--lora.rank", 0, *COMMON)
    ernie(*words, "--out", plain)
    ernie(*words, "--out", fp8, "--precision", "fp8")
    seen = losses(fp8)
    assert seen[0] != losses(plain)[0]
    assert seen[0] == pytest.approx(losses(plain)[0], rel=0.01)  # tests/quant holds that the curve follows
    assert sum(seen[-2:]) < 0.8 * sum(seen[:2])
    assert load(fp8 / "model").opened.spec is None
    assert json.loads((fp8 / "settings.json").read_text())["precision"] == "fp8"
    ernie("align", model, "--data", pairs, "--out", tmp_path / "dpo", "--lora.rank", 0, "--precision", "fp8", *COMMON)
    assert losses(tmp_path / "dpo")[0] == pytest.approx(0.6931, abs=1e-4)  # the reference is rounded as well
    for more, says in (((), "add --lora.rank 0"), (("--lora.rank", 0, "--qat", "w4a8"), "give one of the two")):
        with pytest.raises(ConfigError, match=says):
            ernie("sft", model, "--data", rows, "--out", tmp_path / "other", "--precision", "fp8", *more)


def test_the_plan_counts_what_a_rank_holds(model):
    decoder = load_model(model, dtype="float32")
    sizes = [parameter.numel() for name, parameter in decoder.named_parameters() if "router" not in name]
    routers = sum(parameter.numel() for name, parameter in decoder.named_parameters() if "router" in name and parameter.requires_grad)
    biases = sum(parameter.numel() for name, parameter in decoder.named_parameters() if not parameter.requires_grad)
    whole = 16 * (sum(sizes) + routers) + 4 * biases  # weight, gradient and two means
    for ranks, held in ((ALONE, whole), (Ranks(0, 4), whole), (Ranks(0, 4, True), 4 * sum(sizes) + 16 * routers + 4 * biases)):
        said = next(line for line in plan_text(decoder, {}, ranks).splitlines() if line.startswith("memory"))
        assert f"{held / 1e9:.2f} GB" in said
        assert ("on each of 4 ranks" in said) == ranks.sharded


def test_pretrain_prepares_a_corpus_and_learns_it(model, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text("".join(json.dumps({"text": f"the number {n} follows {n - 1}"}) + "\n" for n in range(40)))
    (texts / "b.txt").write_text("one text file is one document")
    ernie("pretrain", model, "--data", texts, "--prepare", tmp_path / "corpus", "--out", tmp_path / "unused")
    assert "41 documents" in capsys.readouterr().out
    assert not (tmp_path / "unused").exists()
    out = tmp_path / "run"
    how = ("--schedule.peak", "1e-2", "--schedule.warmup", 2, "--batch-tokens", 64, "--steps", 14, "--average-tokens", 200)
    ernie("pretrain", model, "--data", tmp_path / "corpus", "--out", out, "--fresh", *how)
    seen = losses(out)
    assert seen[0] > 5.5  # ln 384 = 5.95
    assert seen[-1] < seen[0] - 1
    a, b = (load_model(out / name).prompt_logits([5, 6, 7]) for name in ("model", "model-averaged"))
    assert not torch.equal(a, b)


def test_a_stopped_run_goes_on_where_it_stood(model, rows, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("--data", rows, "--steps", 6, "--save-every", 2, "--batch-tokens", 128)
    ernie("sft", model, *words, "--out", whole)

    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Stop):
            ernie("sft", model, *words, "--out", cut)
    ernie("sft", model, *words, "--out", cut)
    assert losses(cut) == losses(whole)
    assert (cut / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_a_dry_run_says_the_plan_and_writes_nothing(model, rows, tmp_path, capsys):
    ernie("sft", model, "--data", rows, "--out", tmp_path / "run", "--dry-run")
    text = capsys.readouterr().out
    assert "parameters" in text
    assert "examples     4" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_the_ranks_of_a_layout_would_hold(model, rows, tmp_path, capsys):
    words = ("sft", model, "--data", rows, "--out", tmp_path / "run", "--lora.rank", 0)
    ernie(*words, "--dry-run", "--layout.tensor", 2, "--layout.pipeline", 2)
    text = capsys.readouterr().out
    whole, first, second = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+)(?:, of which| parameters, )", text))
    copies = second + first - whole / 2  # norms and routers whole, and the embedding at both ends
    assert 384 * 64 / 2 < copies < 0.1 * whole + 384 * 64 / 2
    assert "layers.{0..3}.attn.out.weight: [64, 128] -> [64, 64] (tensor along 1)" in text
    for more, says in (((), "--dry-run prints"), (("--dry-run", "--lora.rank", 4), "no rule for layers.0.attn.qkv.*adapter_a|base")):
        with pytest.raises(ConfigError, match=says):
            ernie(*words, "--layout.tensor", 2, *more)


def test_mistakes_are_named(model, rows, pairs, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(DataError, match="no such file"):
        ernie("sft", model, "--data", tmp_path / "none.jsonl", "--out", out)
    with pytest.raises(DataError, match=r"pairs\.jsonl: line 1: is a preference pair"):
        ernie("sft", model, "--data", pairs, "--out", out)
    with pytest.raises(DataError, match=r"rows\.jsonl: line 1: is no preference pair"):
        ernie("align", model, "--data", rows, "--out", out)
    with pytest.raises(DataError, match="more than the limit of 8"):
        ernie("sft", model, "--data", rows, "--out", out, "--batch-tokens", 8)
    with pytest.raises(ConfigError, match=r"did you mean '--schedule\.peak'"):
        ernie("sft", model, "--data", rows, "--out", out, "--schedule.pek", 1)
    for flag in ("--steps", "--epochs", "--batch-tokens", "--accumulate", "--save-every"):
        with pytest.raises(ConfigError, match=f"{flag[2:].replace('-', '_')} must be at least"):
            ernie("sft", model, "--data", rows, "--out", out, flag, 0)
    for flags in (("--keep-gb", 1), ("--offload", "both")):
        with pytest.raises(ConfigError, match=r"--recompute there|--shard none"):
            ernie("sft", model, "--data", rows, "--out", out, "--shard", "weights", *flags)
    with pytest.raises(DataError, match="prepare"):
        ernie("pretrain", model, "--data", tmp_path / "corpus", "--out", out)


def test_bad_rows_are_counted_when_asked(model, rows, tmp_path, capsys):
    rows.write_text(rows.read_text() + '{"src": ["a"]}\n')
    ernie("sft", model, "--data", rows, "--out", tmp_path / "run", "--dry-run", "--skip-bad")
    said = capsys.readouterr()
    assert "left out     1" in said.out
    assert "line 5" in said.err


def test_a_finished_run_is_not_overwritten(model, rows, tmp_path):
    words = ("sft", model, "--data", rows, "--out", tmp_path / "run", "--steps", 1)
    ernie(*words)
    with pytest.raises(RunError, match="finished run"):
        ernie(*words)


def test_a_single_file_cannot_be_trained(tmp_path, model, rows):
    with pytest.raises(CheckpointError):
        ernie("sft", tmp_path / "none.gguf", "--data", rows, "--out", tmp_path / "run")
    assert main(["sft", str(tmp_path / "none.gguf"), "--data", str(rows), "--out", str(tmp_path / "run")]) == 2
