"""`ernie convert-config FILE.yaml`: an ERNIEKit run file as one of ours, and a list of what has no equal here.

ernie convert-config run_sft_8k.yaml --out run.yaml
ernie sft --config run.yaml

Names and defaults of ERNIEKit's settings: its published example files and argument classes (erniekit 1.3).
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from ernie45.config import Environment
from ernie45.errors import ConfigError, did_you_mean
from ernie45.recipes.settings import read_mapping

STAGES = {"SFT": "sft", "DPO": "align", "PT": "pretrain", "VL-SFT": "sft"}
_SEEING = ("VL-SFT",)

# Where a setting of theirs goes, for every stage. A dot is a section of ours.
_SAME: dict[str, str] = {
    "seed": "seed",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "accumulate",
    "save_steps": "save_every",
    "output_dir": "out",
    "recompute": "recompute",
    "warmup_steps": "schedule.warmup",
    "learning_rate": "schedule.peak",
    "min_lr": "schedule.end",
    "lr_scheduler_type": "schedule.shape",
    "weight_decay": "optimiser.weight_decay",
    "adam_epsilon": "optimiser.eps",
    "adam_beta1": "optimiser.beta1",
    "adam_beta2": "optimiser.beta2",
    "max_grad_norm": "optimiser.clip",
    "moe_gate_lr_ratio": "optimiser.router_rate",
    "moe_aux_loss_lambda": "losses.balance",
    "moe_orthogonal_loss_lambda": "losses.orthogonal",
    "moe_z_loss_lambda": "losses.z",
    "moe_use_aux_free_update_coef": "losses.bias_rate",
    "multi_token_pred_lambda": "losses.mtp",
}
_LORA = {"lora_rank": "lora.rank", "rslora": "lora.rslora", "lora_plus_scale": "optimiser.b_rate"}
_ALIGN = {
    "beta": "preference.beta",
    "label_smoothing": "preference.smoothing",
    "offset_alpha": "preference.offset",
    "simpo_gamma": "preference.gamma",
    "dpop_lambda": "preference.positive",
    "sft_loss_ratio": "preference.answer",
    "loss_type": "preference.loss",
}
_VISION = {
    "vit_lr_ratio": "optimiser.tower_rate",
    "token_balance_loss": "losses.token_balanced",
    "min_pixels": "pictures.min_pixels",
    "max_pixels": "pictures.max_pixels",
    "video_min_pixels": "pictures.video_min_pixels",
    "video_max_pixels": "pictures.video_max_pixels",
    "video_fps": "pictures.fps",
    "video_min_frames": "pictures.min_frames",
    "video_max_frames": "pictures.max_frames",
    "render_timestamp": "pictures.timestamps",
}
_FROZEN = {"freeze_vision": ("freeze", ["sight.tower.*"]), "freeze_lm": ("stage", "vision")}
"""What a word in `freeze_config` is here: the vision tower stays, or the language model does."""
_QUANTISED = {"wint4/8": "w4a16", "nf4": "w4a16", "wint8": "w8a16"}
"""Words for a quantised base, and the scheme nearest to each."""
_LOSSES = {"kto_pair": "kto-pair", "sppo_hard": "sppo", "nca_pair": "nca"}

_PADDLE = "a switch of Paddle's kernels or runtime; nothing here needs it"
_LAYOUT = "the layout over devices; it is no matter of the run file here"
_ALWAYS = "is always so here"
# Settings that may be dropped without a change of what is learned, by why.
_WITHOUT_EFFECT: dict[str, str] = (
    dict.fromkeys(
        [
            "fuse_rope",
            "fuse_linear",
            "fuse_rms_norm",
            "fuse_swiglu",
            "fuse_softmax_mask",
            "fuse_gate_detach_matmul",
            "use_flash_attention",
            "use_mem_eff_attn",
            "use_flash_attn_with_mask",
            "use_attn_mask_start_row_indices",
            "use_sparse_flash_attn",
            "use_sparse_head_and_loss_fn",
            "use_fused_head_and_loss_fn",
            "use_recompute_loss_fn",
            "loss_subbatch_seqlen",
            "release_grads",
            "fp16_opt_level",
            "amp_master_grad",
            "amp_custom_white_list",
            "amp_custom_black_list",
            "scale_loss",
            "disable_ckpt_quant",
            "unified_checkpoint",
            "unified_checkpoint_config",
            "offload_optim",
            "tensorwise_offload_optimizer",
            "optim",
            "use_lowprecision_moment",
            "recompute_use_reentrant",
            "recompute_granularity",
            "use_recompute_moe",
            "pre_alloc_memory",
            "gc_interval",
            "moe_group",
            "use_moe",
            "moe_multimodal_dispatch_use_allgather",
            "moe_use_aux_free",
            "disable_pipeline_warmup",
            "bf16",
            "optim_shard_num",
        ],
        _PADDLE,
    )
    | dict.fromkeys(
        [
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "sharding_parallel_degree",
            "sharding",
            "sequence_parallel",
            "pp_seg_method",
            "virtual_pp_degree",
            "tensor_parallel_config",
            "pipeline_parallel_config",
            "sharding_parallel_config",
            "use_sp_callback",
            "distributed_dataloader",
            "pp_need_data",
            "pp_need_data_degree",
            "sharding_comm_buffer_size_MB",
            "save_sharding_stage1_model_include_freeze_params",
        ],
        _LAYOUT,
    )
    | dict.fromkeys(
        [
            "do_train",
            "train_dataset_type",
            "eval_dataset_type",
            "dataloader_num_workers",
            "prefetch_factor",
            "num_samples_each_epoch",
            "logging_steps",
            "logging_dir",
            "disable_tqdm",
            "overwrite_output_dir",
            "save_strategy",
            "save_total_limit",
            "packing",
            "same_data",
            "serialize_output",
            "image_token_len",
            "patch_size",
            "spatial_conv_size",
            "use_pic_id",
            "variable_resolution",
            "chat_template",
            "text_use_token_type",
        ],
        _ALWAYS,
    )
)
_NO_EQUAL: dict[str, str] = {
    "eval_dataset_prob": "every held-out row is measured, once",
    "max_evaluate_steps": "every held-out row is measured, once",
    "layerwise_lr_decay_bound": "learning rates do not fall off by layer",
    "attention_probs_dropout_prob": "the family is trained without dropout here",
    "hidden_dropout_prob": "the family is trained without dropout here",
    "dropout_warmup_steps": "the family is trained without dropout here",
    "modality_ratio": "which source a batch comes from follows from `weights`; rows of all kinds share batches",
    "modality_interleave": "rows of all kinds share batches",
    "text_dataset_path": "name these files in `data` too",
    "text_dataset_prob": "`weights` says how often an epoch holds the rows of each name in `data`",
    "video_frames_sample": "frames are the middle ones of equal parts of the video",
    "drop_untrainble_sample": "`--skip-bad` leaves rows out that teach nothing",
    "one_sample_in_one_seq": "rows are packed, and none sees another",
    "mix_strategy": "every row is seen once an epoch; `weights` changes how often",
    "apply_hadamard": "belongs to `compute_type: fp8`",
    "apply_online_actscale_step": "belongs to `compute_type: fp8`",
    "reference_free": "choose the loss simpo or orpo, which have no reference",
    "ref_model_update_steps": "the reference stays as it is",
}
_HARMLESS: dict[str, Any] = {"layerwise_lr_decay_bound": 1.0, "reference_free": False, "ref_model_update_steps": -1, "pref_loss_ratio": 1.0}
"""Values at which a setting without an equal says what happens here anyway."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Read an ERNIEKit run file and write it as one of ours."""

    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The YAML file that `erniekit train` would take."""
    out: Path | None = None
    """Where ours is written; by default it is printed."""


@dataclass(frozen=True)
class Converted:
    """A run file of ours: the word it belongs to, its settings, what was dropped as without effect, and what has no equal, with reasons."""

    word: str
    settings: dict[str, Any]
    dropped: dict[str, str]
    no_equal: dict[str, str]
    hints: tuple[str, ...]


def run(config: ConvertConfig, environment: Environment) -> int:
    """Convert. Raises ConfigError for a file that is no ERNIEKit run file, or of a stage without an equal."""
    made = convert(read_mapping(config.path))
    text = f"# ernie {made.word} --config {config.out or 'FILE'}\n" + yaml.safe_dump(made.settings, sort_keys=False, allow_unicode=True)
    if config.out is None:
        print(text, end="")
    else:
        try:
            config.out.write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(f"{config.out}: cannot be written: {error.strerror or error}") from error
    for title, entries in (("no equal here", made.no_equal), ("dropped, without effect on what is learned", made.dropped)):
        if entries:
            print(f"\n{title}:", file=sys.stderr)
            width = max(map(len, entries))
            for name, why in entries.items():
                print(f"  {name:<{width}}  {why}", file=sys.stderr)
    for hint in made.hints:
        print(f"\n{hint}", file=sys.stderr)
    return 0


def convert(theirs: Mapping[str, Any]) -> Converted:
    """An ERNIEKit run file as ours. Raises ConfigError for a stage that has no equal, or a value that cannot be read."""
    stage = str(theirs.get("stage", "SFT"))
    if stage not in STAGES:
        raise ConfigError(f"stage {stage} has no equal here; stages that can be converted: {', '.join(STAGES)}")
    if "model_name_or_path" not in theirs or "train_dataset_path" not in theirs:
        raise ConfigError("this is no run file of ERNIEKit: it must name model_name_or_path and train_dataset_path")
    conversion = _Conversion(theirs, STAGES[stage])
    for name, value in theirs.items():
        conversion.take(name, value)
    return Converted(conversion.word, _nested(conversion.ours), conversion.dropped, conversion.no_equal, tuple(conversion.hints))


class _Conversion:
    """One file on its way. A method named after a setting of theirs does what takes more than another name."""

    def __init__(self, theirs: Mapping[str, Any], word: str) -> None:
        self.theirs, self.word = theirs, word
        sees = str(theirs.get("stage")) in _SEEING
        self.table = _SAME | (_LORA if word != "pretrain" else {}) | (_ALIGN if word == "align" else {}) | (_VISION if sees else {})
        self.special: dict[str, Callable[[Any], None]] = {
            "stage": self.nothing,
            "batch_size": self.nothing,
            "per_device_train_batch_size": self.nothing,
            "model_name_or_path": self.model,
            "train_dataset_path": self.data,
            "train_dataset_prob": self.shares,
            "max_seq_len": self.length,
            "max_steps": self.steps,
            "fine_tuning": self.tuning,
            "lora_alpha": self.alpha,
            "compute_type": self.precision,
            "do_eval": self.nothing,
            "evaluation_strategy": self.nothing,
            "eval_steps": self.nothing,
            "eval_dataset_path": self.held_out,
            "num_nextn_predict_layers": self.ahead,
            "freeze_config": self.frozen,
        }
        if theirs.get("compute_type") == "fp8" and word == "sft":
            self.table |= {"apply_online_actscale_step": "qat_online"}
            self.special["apply_hadamard"] = self.nothing
        self.ours: dict[str, Any] = {}
        self.dropped: dict[str, str] = {}
        self.no_equal: dict[str, str] = {}
        self.hints: list[str] = []
        self.sees = sees
        if sees:
            self.ours["losses.mtp"] = 0.0

    def take(self, name: str, value: Any) -> None:
        """One setting of theirs."""
        if name in self.special:
            self.special[name](value)
        elif name in self.table:
            self.ours[self.table[name]] = _plain(self.table[name], value)
        elif name in _HARMLESS and _number(value) == _HARMLESS[name]:
            self.dropped[name] = _ALWAYS
        elif name in _WITHOUT_EFFECT:
            self.dropped[name] = _WITHOUT_EFFECT[name]
        else:
            near = did_you_mean(name, [*self.table, *self.special, *_WITHOUT_EFFECT, *_NO_EQUAL])
            self.no_equal[name] = _NO_EQUAL.get(name, f"is not known{near if near.startswith('; did') else ''}")

    def nothing(self, value: Any) -> None:
        """Read where another setting needs it."""

    def model(self, value: Any) -> None:
        """Paddle's weights have a sibling for PyTorch under another name."""
        name = str(value).rstrip("/")
        self.ours["model"] = f"{name.removesuffix('-Paddle')}-PT" if name.startswith("baidu/") and name.endswith("-Paddle") else name

    def data(self, value: Any) -> None:
        """A list with commas; texts become a corpus first."""
        paths = _listed(value)
        if self.word == "pretrain":
            self.model(self.theirs["model_name_or_path"])
            made = f"ernie pretrain {self.ours['model']} --data {' '.join(paths)} --prepare corpus --out unused"
            self.hints.append(f"first make the corpus: {made}")
            paths = ["corpus"]
        self.ours["data"] = paths

    def shares(self, value: Any) -> None:
        """Probabilities of sources; one source needs none."""
        if len(_listed(value)) > 1:
            self.no_equal["train_dataset_prob"] = "how likely a source is drawn; `weights` here says how often an epoch holds its rows"

    def length(self, value: Any) -> None:
        """Tokens of a row times rows: what goes through the model at once."""
        rows = _number(self.theirs.get("batch_size", self.theirs.get("per_device_train_batch_size", 1))) or 1
        self.ours["batch_tokens"] = int((_number(value) or 4096) * rows)

    def steps(self, value: Any) -> None:
        """-1 there: what the epochs need."""
        steps = _number(value)
        if steps is not None and steps > 0:
            self.ours["steps"] = int(steps)

    def tuning(self, value: Any) -> None:
        """Full, or adapters."""
        if self.word != "pretrain" and str(value).lower() != "lora":
            self.ours["lora.rank"] = 0

    def alpha(self, value: Any) -> None:
        """-1 there: the default, which is the same here."""
        alpha = _number(value)
        if alpha is not None and alpha > 0 and self.word != "pretrain":
            self.ours["lora.alpha"] = alpha

    def precision(self, value: Any) -> None:
        """bf16; fp8, which is learning through the rounding of an FP8 model; or a word for a quantised base, which is made first."""
        if value == "bf16":
            self.ours["dtype"] = "bfloat16"
        elif value == "fp8" and self.word == "sft":
            turned = self.theirs.get("apply_hadamard", True)
            self.ours |= {"qat": "fp8-tensor-static" + ("-h" if turned else ""), "lora.rank": 0}
        elif value in _QUANTISED and self.word != "pretrain":
            self.no_equal["compute_type"] = (
                f"{value}: adapters learn beside a model that is quantised already; first `ernie quantize MODEL --scheme "
                f"{_QUANTISED[value]} --out small`, then `model: small`"
            )
        else:
            self.no_equal["compute_type"] = f"{value}: training computes in float32 or bfloat16 here"

    def held_out(self, value: Any) -> None:
        """Rows that are not learned from, unless nothing is to be evaluated."""
        how = str(self.theirs.get("evaluation_strategy", "steps")).lower()
        if not self.theirs.get("do_eval", True) or how == "no":
            self.dropped["eval_dataset_path"] = "nothing is to be evaluated"
            return
        paths = _listed(value)
        if self.word == "pretrain":
            self.hints.append(f"and the held-out one: ernie pretrain MODEL --data {' '.join(paths)} --prepare held-out --out unused")
            paths = ["held-out"]
        self.ours["held_out"] = paths
        every = _number(self.theirs.get("eval_steps"))
        if every is not None and every >= 1:
            self.ours["eval_every"] = int(every)
        if how != "steps":
            self.no_equal["evaluation_strategy"] = f"{how}: held-out rows are measured every `eval_every` steps and at the end"

    def frozen(self, value: Any) -> None:
        """Words, apart by spaces."""
        words = str(value or "").replace(",", " ").split()
        if words and not self.sees:
            self.no_equal["freeze_config"] = "is for models that see; this is no file of stage VL-SFT"
            return
        for word in words:
            if word in _FROZEN and str(self.theirs.get("fine_tuning", "LoRA")).lower() == "lora":
                self.dropped["freeze_config"] = "adapters leave all weights as they are"
            elif word in _FROZEN:
                setting, choice = _FROZEN[word]
                self.ours[setting] = choice
            else:
                self.no_equal["freeze_config"] = f"{word} is not known; known are {', '.join(_FROZEN)}"

    def ahead(self, value: Any) -> None:
        """0: the multi-token prediction block is not trained."""
        if not _number(value):
            self.ours["losses.mtp"] = 0.0


def _listed(value: Any) -> list[str]:
    return [part.strip() for part in str(value).split(",") if part.strip()]


def _plain(place: str, value: Any) -> Any:
    if place == "schedule.shape":
        shapes = {"constant_with_warmup": "constant", "wsd": "wsd"}
        shape = shapes.get(str(value).lower(), str(value).lower())
        if shape not in ("constant", "linear", "cosine", "wsd"):
            raise ConfigError(f"lr_scheduler_type {value} has no equal here; allowed: constant, linear, cosine, wsd")
        return shape
    if place == "preference.loss":
        return _LOSSES.get(str(value), str(value))
    if not isinstance(value, str):
        return value
    number = _number(value)
    return value if number is None else int(number) if value.strip().lstrip("-").isdigit() else number


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`section.name` as sections; settings without a section first."""
    made: dict[str, Any] = {name: value for name, value in flat.items() if "." not in name}
    for name, value in flat.items():
        section, dot, last = name.partition(".")
        if dot:
            made.setdefault(section, {})[last] = value
    return made
