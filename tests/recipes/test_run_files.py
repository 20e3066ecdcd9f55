"""The run files in `runs/`, and ERNIEKit's files as ours: what can be said is said the same, what cannot is named."""

import sys
from pathlib import Path

import pytest
import yaml

from ernie45.cli import WORDS, main, read_config
from ernie45.errors import ConfigError
from ernie45.models.released import CHECKPOINTS
from ernie45.recipes.convert_config import convert
from ernie45.recipes.settings import read_yaml

RUNS = Path(__file__).parents[2] / "runs"
FILES = sorted(path for path in RUNS.rglob("*.yaml") if path.parent.name != "story")  # those begin from nothing: tests/story

# What the published examples set, without the switches that all of them share.
COMMON = {
    "train_dataset_type": "erniekit",
    "train_dataset_path": "./a.jsonl,./b.jsonl",
    "train_dataset_prob": "0.5,0.5",
    "max_seq_len": 8192,
    "fuse_rope": True,
    "do_train": True,
    "do_eval": True,
    "batch_size": 2,
    "num_train_epochs": 1,
    "max_steps": 100,
    "save_steps": 100,
    "release_grads": True,
    "gradient_accumulation_steps": 8,
    "output_dir": "./output",
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "min_lr": 1.0e-7,
    "layerwise_lr_decay_bound": 1.0,
    "weight_decay": 0.1,
    "adam_epsilon": 1.0e-8,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "tensor_parallel_degree": 8,
    "sharding": "stage1",
    "recompute": False,
    "amp_custom_black_list": ["reduce_sum", "sin"],
    "unified_checkpoint": True,
}
EXAMPLES = {
    "sft": {"stage": "SFT", "model_name_or_path": "baidu/ERNIE-4.5-0.3B-Paddle", "fine_tuning": "Full", "learning_rate": 1e-5, "seed": 23},
    "fp8": {
        "stage": "SFT",
        "model_name_or_path": "baidu/ERNIE-4.5-300B-A47B-Paddle",
        "fine_tuning": "Full",
        "compute_type": "fp8",
        "apply_hadamard": True,
        "apply_online_actscale_step": 100,
        "learning_rate": 1e-5,
        "eval_dataset_path": "./check.jsonl",
        "evaluation_strategy": "steps",
        "eval_steps": 50,
        "max_evaluate_steps": 8,
    },
    "lora": {
        "stage": "SFT",
        "model_name_or_path": "baidu/ERNIE-4.5-21B-A3B-Paddle/",
        "fine_tuning": "LoRA",
        "lora_rank": 32,
        "learning_rate": 3e-4,
        "compute_type": "wint4/8",
        "moe_group": "mp",
        "moe_gate_lr_ratio": 0.01,
    },
    "dpo": {
        "stage": "DPO",
        "model_name_or_path": "baidu/ERNIE-4.5-0.3B-Paddle",
        "fine_tuning": "LoRA",
        "lora_rank": 32,
        "lora_alpha": 128,
        "lora_plus_scale": 12,
        "rslora": True,
        "learning_rate": 5e-7,
        "offset_alpha": 0.0,
        "loss_type": "kto_pair",
        "attention_probs_dropout_prob": 0.1,
        "compute_type": "bf16",
    },
    "vl": {
        "stage": "VL-SFT",
        "model_name_or_path": "baidu/ERNIE-4.5-VL-28B-A3B-Paddle",
        "fine_tuning": "Full",
        "learning_rate": 1e-5,
        "moe_gate_lr_ratio": 0.01,
        "vit_lr_ratio": 0.9,
        "freeze_config": "freeze_vision",
        "token_balance_loss": True,
        "modality_ratio": [1, 1],
        "max_pixels": 1003520,
        "video_fps": 1,
        "video_max_frames": 32,
        "render_timestamp": True,
        "image_token_len": 64,
        "chat_template": "ernie_vl",
    },
    "pt": {"stage": "PT", "model_name_or_path": "somewhere", "fine_tuning": "Full", "learning_rate": 1e-5, "max_steps": -1},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_run_file_is_a_run(path):
    head = path.read_text().splitlines()[0].split()
    assert head == ["#", "ernie", head[2], "--config", str(path.relative_to(RUNS.parent))]
    module = __import__(WORDS[head[2]].module, fromlist=["run"])
    config = read_yaml(getattr(module, WORDS[head[2]].config), path, head[2])
    assert config.model.removeprefix("baidu/").removesuffix("-PT") in {name.removesuffix("-PT") for name in CHECKPOINTS}
    assert read_config(head[2], type(config), ["--config", str(path), "--out", "elsewhere"]).out == Path("elsewhere")


def test_every_method_has_a_file_for_every_size():
    text = {"pretrain", "sft", "sft-lora", "dpo", "dpo-lora"}
    seeing = {"pretrain-sight", "pretrain-vision", *text}
    methods = {size: seeing if size.startswith("VL-") else text for size in {path.parent.name for path in FILES}}
    assert len(methods) == 5
    assert {(path.parent.name, path.stem) for path in FILES} == {(size, method) for size in methods for method in methods[size]}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_becomes_a_run_of_ours(name, tmp_path, capsys):
    theirs = COMMON | EXAMPLES[name]
    source, target = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    source.write_text(yaml.safe_dump(theirs))
    assert main(["convert-config", str(source), "--out", str(target)]) == 0
    word = {"sft": "sft", "fp8": "sft", "lora": "sft", "vl": "sft", "dpo": "align", "pt": "pretrain"}[name]
    assert target.read_text().startswith(f"# ernie {word} --config {target}\n")
    module = sys.modules.get(WORDS[word].module) or __import__(WORDS[word].module, fromlist=["run"])
    ours = read_yaml(getattr(module, WORDS[word].config), target, word)
    assert (ours.batch_tokens, ours.accumulate, ours.out, ours.save_every) == (16384, 8, Path("output"), 100)
    assert (ours.schedule.peak, ours.schedule.warmup, ours.schedule.shape) == (theirs["learning_rate"], 20, "cosine")
    assert (ours.optimiser.beta2, ours.optimiser.weight_decay) == (0.95, 0.1)
    report = capsys.readouterr().err
    assert "train_dataset_prob" in report.partition("dropped")[0]
    assert "tensor_parallel_degree" in report.partition("dropped")[2]
    if name == "sft":
        assert (ours.model, ours.lora.rank, ours.seed, ours.steps) == ("baidu/ERNIE-4.5-0.3B-PT", 0, 23, 100)
    if name == "vl":
        assert (ours.model, ours.freeze, ours.losses.token_balanced) == ("baidu/ERNIE-4.5-VL-28B-A3B-PT", ("sight.tower.*",), True)
        assert (ours.optimiser.router_rate, ours.optimiser.tower_rate, ours.losses.mtp) == (0.01, 0.9, 0.0)
        assert (ours.pictures.max_pixels, ours.pictures.fps, ours.pictures.max_frames, ours.pictures.timestamps) == (1003520, 1, 32, True)
        assert "modality_ratio" in report.partition("dropped")[0]
        assert "image_token_len" in report.partition("dropped")[2]
    if name == "lora":
        assert (ours.model, ours.lora.rank, ours.optimiser.router_rate) == ("baidu/ERNIE-4.5-21B-A3B-PT", 32, 0.01)
        assert "wint4/8: adapters learn beside a model that is quantised already; first `ernie quantize MODEL --scheme w4a16" in report
    if name == "fp8":
        assert (ours.qat, ours.qat_online, ours.lora.rank) == ("fp8-tensor-static-h", 100, 0)
        assert (ours.held_out, ours.eval_every) == ((Path("./check.jsonl"),), 50)
        assert "max_evaluate_steps" in report.partition("dropped")[0]
        assert not {"apply_hadamard", "do_eval", "eval_steps"} & set(report.split())
    if name == "dpo":
        assert (ours.lora.strength, ours.lora.rslora, ours.optimiser.b_rate, ours.preference.loss) == (128, True, 12, "kto-pair")
        assert (ours.dtype, "attention_probs_dropout_prob" in report) == ("bfloat16", True)
    if name == "pt":
        assert (ours.data, ours.steps, "--prepare corpus" in report) == ((Path("corpus"),), None, True)


def test_what_cannot_be_converted_is_said():
    theirs = COMMON | EXAMPLES["sft"]
    made = convert(theirs | {"learning_rat": 1, "freeze_config": "freeze_vision", "layerwise_lr_decay_bound": 0.5})
    assert made.no_equal["learning_rat"] == "is not known; did you mean 'learning_rate'?"
    assert made.no_equal["freeze_config"] == "is for models that see; this is no file of stage VL-SFT"
    half = convert(theirs | {"stage": "VL-SFT", "freeze_config": "freeze_lm"})
    assert half.settings["stage"] == "vision"
    assert convert(theirs | {"stage": "VL-SFT", "freeze_config": "freeze_lm freeze_vision"}).settings["freeze"] == ["sight.tower.*"]
    assert (
        convert(theirs | {"stage": "VL-SFT", "freeze_config": "freeze_al"}).no_equal["freeze_config"].startswith("freeze_al is not known")
    )
    assert "layerwise_lr_decay_bound" in made.no_equal
    check = {"eval_dataset_path": "a.jsonl, b.jsonl", "evaluation_strategy": "epoch"}
    assert convert(theirs | check).settings["held_out"] == ["a.jsonl", "b.jsonl"]
    assert convert(theirs | check).no_equal["evaluation_strategy"].startswith("epoch: ")
    assert "held_out" not in convert(theirs | check | {"do_eval": False}).settings
    texts = convert(theirs | EXAMPLES["pt"] | check)
    assert texts.settings["held_out"] == ["held-out"]
    assert "--data a.jsonl b.jsonl --prepare held-out" in texts.hints[1]
    with pytest.raises(ConfigError, match="stage VL-DPO has no equal here; stages that can be converted: SFT, DPO, PT, VL-SFT"):
        convert(theirs | {"stage": "VL-DPO"})
    with pytest.raises(ConfigError, match="no run file of ERNIEKit"):
        convert({"seed": 1})
    with pytest.raises(ConfigError, match="lr_scheduler_type polynomial has no equal"):
        convert(theirs | {"lr_scheduler_type": "polynomial"})
