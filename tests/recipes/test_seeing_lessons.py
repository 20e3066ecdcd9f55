"""Teaching a model what it sees, as people do it: rows in a file, photographs beside them, and a model that answers about each."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from transformers import Ernie4_5_VLMoeForConditionalGeneration
from transformers.utils import logging

from ernie45.engine.client import LLM
from ernie45.engine.request import SamplingParams
from ernie45.errors import ConfigError, DataError
from ernie45.models.load import load_model
from ernie45.recipes.seeing import kept_numbers
from ernie45.tokens.patches import patches
from ernie45.train.recompute import measure
from tests.recipes.lessons import Stop, ernie, losses, stop_at
from tests.sighted import VISION, sighted_decoder

CAPTIONS = {
    "astronaut.png": "a woman in a space suit",
    "camera.png": "a man with a camera",
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "coins.png": "old coins",
    "horse.png": "a horse",
    "page.png": "a page of text",
    "rocket.jpg": "a rocket",
}
QUESTION = "What is this?"
LEARN = ("--lora.rank", 0, "--batch-tokens", 512, "--schedule.peak", "3e-3", "--schedule.warmup", 5)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory, put_photos):
    """Eight photographs with what they show, in ERNIEKit's form."""
    folder = tmp_path_factory.mktemp("data")
    put_photos(folder, CAPTIONS)
    rows = []
    for name, caption in CAPTIONS.items():
        texts = [{"text": QUESTION, "tag": "mask"}, {"text": caption, "tag": "no_mask"}]
        rows.append({"image_info": [{"matched_text_index": 0, "image_url": f"./{name}"}], "text_info": texts})
    write(folder / "rows.jsonl", rows)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def asked(path):
    """The question about a picture, as a client asks it."""
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(path)}}, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def taught(seer, data, tmp_path_factory):
    """The run in which the tiny model learns the eight pictures by heart."""
    out = tmp_path_factory.mktemp("taught") / "run"
    assert ernie("sft", seer, "--data", data / "rows.jsonl", "--out", out, *LEARN, "--steps", 60) == 0
    return out


def test_eight_pictures_are_learned_and_told_apart(taught, data):
    """All questions are the same: only the pictures can tell the answers apart."""
    assert losses(taught)[0] > 5
    assert losses(taught)[-1] < 0.1
    log = [json.loads(line) for line in (taught / "log.jsonl").read_text().splitlines()]
    assert all(line["vision_loss"] == pytest.approx(line["loss"], rel=1e-5) for line in log)
    assert len(log[0]["vision_load"]) == 3
    llm = LLM(taught / "model", dtype="float32")
    answers = {name: llm.chat(asked(data / name), SamplingParams(max_tokens=30, temperature=0.0)).text for name in CAPTIONS}
    assert answers == CAPTIONS


def test_the_taught_model_loads_in_transformers(taught, data):
    llm = LLM(taught / "model", dtype="float32")
    messages, (picture,) = llm.sight.look(asked(data / "coffee.png"))
    prompt = llm.template.render(messages)
    pixels = torch.from_numpy(patches(picture, llm.sight.rules))
    ours = load_model(taught / "model").prompt_logits(prompt.ids, [(pixels, picture.grid)])
    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(taught / "model", dtype=torch.float32).eval()
    ids = torch.tensor([prompt.ids])
    config = load_model(taught / "model").sight.config
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_id).int(),
        "moe_mm_token_type_ids": torch.isin(ids, torch.tensor(sorted(config.vision_ids))).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([picture.grid]),
    }
    with torch.inference_mode():
        # float32, other order of sums, logits up to 20
        torch.testing.assert_close(ours, model(**inputs).logits[0], atol=5e-4, rtol=1e-4)


def test_a_stopped_run_with_pictures_goes_on_to_the_bit(seer, data, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("--data", data / "rows.jsonl", *LEARN, "--steps", 3, "--save-every", 1, "--losses.bias-rate", 0.01, "--shelf-mb", 0)
    ernie("sft", seer, *words, "--out", whole)

    with monkeypatch.context() as patch:
        stop_at(1, patch)
        with pytest.raises(Stop):
            ernie("sft", seer, *words, "--out", cut)
    ernie("sft", seer, *words, "--out", cut)
    assert losses(cut) == losses(whole)
    assert (cut / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_stages_follow_each_other(seer, data, tmp_path):
    """Tower and resampler, then the vision experts too: the language model stays as it was, in the published files."""
    first, then = tmp_path / "first", tmp_path / "then"
    ernie("sft", seer, "--data", data / "rows.jsonl", "--out", first, *LEARN, "--steps", 2, "--stage", "sight")
    ernie(
        "sft",
        first / "model",
        "--data",
        data / "rows.jsonl",
        "--out",
        then,
        *LEARN,
        "--steps",
        2,
        "--stage",
        "vision",
        "--freeze",
        "sight.tower.*",
    )
    base, one, two = (dict(load_model(folder).named_parameters()) for folder in (seer, first / "model", then / "model"))
    assert {name.split(".")[1] for name in base if not torch.equal(base[name], one[name])} == {"tower", "resampler"}
    changed = {name for name in base if not torch.equal(one[name], two[name])}
    assert changed
    assert all(name.startswith("sight.resampler.") or ".ffn.vision." in name for name in changed)
    with pytest.raises(ConfigError, match=r"stage and freeze choose among whole weights.*--lora\.rank 0"):
        ernie("sft", seer, "--data", data / "rows.jsonl", "--out", tmp_path / "x", "--stage", "vision")


def test_adapters_learn_beside_pictures(seer, data, tmp_path):
    out = tmp_path / "run"
    ernie(
        "sft",
        seer,
        "--data",
        data / "rows.jsonl",
        "--out",
        out,
        "--lora.vision",
        "all",
        "--batch-tokens",
        512,
        "--steps",
        12,
        "--schedule.peak",
        "1e-2",
    )
    assert losses(out)[-1] < losses(out)[0] - 1
    assert LLM(out / "model", dtype="float32").chat(asked(data / "coins.png"), SamplingParams(max_tokens=3)).text is not None


def test_pretraining_mixes_texts_and_pictures(seer, data, tmp_path, capsys):
    texts = write(tmp_path / "texts.jsonl", [{"text": f"The number {n} follows {n - 1}."} for n in range(30)])
    ernie("pretrain", seer, "--data", texts, "--prepare", tmp_path / "corpus", "--out", tmp_path / "unused")
    captions = write(data / "captions.jsonl", [{"image": name, "text": f"This is {caption}."} for name, caption in CAPTIONS.items()])
    out = tmp_path / "run"
    how = (
        "--batch-tokens",
        256,
        "--steps",
        12,
        "--accumulate",
        2,
        "--schedule.peak",
        "3e-3",
        "--schedule.warmup",
        2,
        "--losses.token-balanced",
    )
    both = ("--data", tmp_path / "corpus", captions, "--weights", 1, 1, "--held-out", captions, tmp_path / "corpus", "--eval-every", 6)
    capsys.readouterr()
    ernie("pretrain", seer, *both, "--out", out, *how)
    said = capsys.readouterr().out
    assert "8 images, 0 videos: 464 tokens" in said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all({"vision_loss", "text_loss", "vision_balance_loss", "vision_orthogonal_loss"} <= line.keys() for line in log)
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert log[-1]["held_out_loss"] < log[5]["held_out_loss"]
    load_model(out / "model")


def test_what_cannot_be_read_is_named(model, seer, data, tmp_path):
    out = ("--out", tmp_path / "run")
    with pytest.raises(DataError, match=r"rows\.jsonl: holds rows, and a model that reads text alone learns from a corpus"):
        ernie("pretrain", model, "--data", data / "rows.jsonl", *out)
    with pytest.raises(DataError, match=r"rows\.jsonl: line 1: has pictures, and this model reads text alone"):
        ernie("sft", model, "--data", data / "rows.jsonl", *out)
    with pytest.raises(DataError, match=r"rows\.jsonl: line 1: has pictures; name its file in `data` beside the corpora"):
        ernie("pretrain", seer, "--data", data / "rows.jsonl", "--prepare", tmp_path / "c", *out)
    talk = write(tmp_path / "talk.jsonl", [{"src": ["a"], "tgt": ["b"]}])
    with pytest.raises(DataError, match=r"talk\.jsonl: line 1: is a conversation; pre-training reads texts and rows with pictures"):
        ernie("pretrain", seer, "--data", talk, *out)


def test_a_dry_run_counts_pictures(seer, data, tmp_path, capsys):
    ernie("sft", seer, "--data", data / "rows.jsonl", "--out", tmp_path / "run", "--dry-run")
    said = capsys.readouterr().out
    assert "pictures     8 images, 0 videos: 464 tokens, 1,856 patches" in said
    assert "largest      256 patches" in said
    ernie("sft", seer, "--data", data / "rows.jsonl", "--out", tmp_path / "run", "--dry-run", "--pictures.max-pixels", 32 * 32)
    assert "8 images, 0 videos: 102 tokens, 408 patches" in capsys.readouterr().out


def test_the_plan_of_memory_is_what_is_kept():
    decoder = sighted_decoder(vision=replace(VISION, size=64, num_heads=2, ffn_size=160, depth=3))
    parts = measure(decoder, lambda: decoder.sight(torch.randn(24 * 20, VISION.patch_values), [(1, 24, 20)]))
    assert [part.name for part in parts] == ["tower"] * 3 + ["resampler"]
    kept = sum(part.bytes for part in parts) / 4
    assert kept_numbers(480, decoder.sight.config, recompute=False) == pytest.approx(kept, rel=0.1)


def test_bad_pictures_are_named_or_counted(seer, data, tmp_path, capsys):
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    rows[1]["image_info"][0]["image_url"] = "gone.png"
    bad = write(data / "bad.jsonl", rows)
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2: messages\[0\]\.content\[0\]: .*gone\.png cannot be read: No such file"):
        ernie("sft", seer, "--data", bad, "--out", tmp_path / "run")
    ernie("sft", seer, "--data", bad, "--out", tmp_path / "run", "--dry-run", "--skip-bad")
    assert "7 images" in capsys.readouterr().out


def test_rows_with_pictures_are_previewed(seer, data, tmp_path, capsys):
    assert ernie("data", "preview", data / "rows.jsonl", "--model", seer, "--rows", 1) == 0
    said = capsys.readouterr().out
    assert "astronaut.png, 16 x 16 patches" in said
    assert "<|IMAGE_START|>⟨64 tokens of a picture⟩<|IMAGE_END|>What is this?" in said
    assert "⟦a woman in a space suit⟧" in said
    assert ernie("data", "check", data / "rows.jsonl", "--model", seer) == 0
    assert "pictures  8" in capsys.readouterr().out
    ernie("data", "preview", data / "rows.jsonl", "--model", seer, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img alt="') == 3
    assert base64.b64decode(page.partition("data:image/png;base64,")[2].partition('"')[0]).startswith(b"\x89PNG")


def test_preferences_about_pictures_are_learned(taught, data, tmp_path, capsys):
    """The better answer gains on rows that are not learned from too; what a step cost is in the log."""
    pairs = [
        {"prompt": asked(data / name), "chosen": f"I see {caption}.", "rejected": f"No idea, {caption}?"}
        for name, caption in CAPTIONS.items()
    ]
    rows, check = write(tmp_path / "pairs.jsonl", pairs[:4]), write(tmp_path / "check.jsonl", pairs[4:])
    assert ernie("data", "check", rows, "--model", taught / "model") == 0
    assert "pictures  4" in capsys.readouterr().out
    out = tmp_path / "run"
    how = ("--batch-tokens", 512, "--steps", 8, "--schedule.peak", "2e-3", "--eval-every", 4)
    ernie("align", taught / "model", "--data", rows, "--held-out", check, "--out", out, *how)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert log[-1]["margin"] > 0.1
    assert log[-1]["held_out_loss"] < log[3]["held_out_loss"] < 0.6931
    assert log[-1]["held_out_accuracy"] == 1.0
    assert {"work", "mfu", "vision_tokens"} <= log[0].keys()
    inside = write(
        tmp_path / "inside.jsonl", [{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}, *asked("x")]}]
    )
    with pytest.raises(DataError, match=r"inside\.jsonl: line 1: a picture stands behind the first answer"):
        ernie("align", taught / "model", "--data", inside, "--out", tmp_path / "other")


def test_held_out_rows_may_have_pictures(seer, data, tmp_path):
    out = tmp_path / "run"
    ernie(
        "sft", seer, "--data", data / "rows.jsonl", "--held-out", data / "rows.jsonl", "--out", out, *LEARN, "--steps", 2, "--eval-every", 1
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log[1]["held_out_loss"] < log[0]["held_out_loss"]
