"""What the training recipes share: opening a model to train, saying the plan, showing the steps, writing the result.

A run folder holds `settings.json` (every setting, resolved), `plan.json` (its length), `log.jsonl` (a line a step), `samples.jsonl` (what
the model wrote at its checkpoints), `checkpoints/`, and at the end `model/`, which chats and loads everywhere, and `adapter/` (PEFT) where
adapters were trained. `ernie watch` shows it.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ernie45.config import Environment
from ernie45.errors import CheckpointError, ConfigError, DataError, RunError
from ernie45.models.adapters import save_adapter
from ernie45.models.layout import Layout
from ernie45.models.load import LoadedModel, load
from ernie45.models.on_the_fly import completed
from ernie45.models.save import save_model, save_packed
from ernie45.models.text import Decoder
from ernie45.models.vision_config import VisionConfig
from ernie45.nn.attention import PackedCausal
from ernie45.nn.lora import LoraConfig, merge
from ernie45.nn.moe import Router
from ernie45.parallel.ranks import ALONE, Ranks
from ernie45.parallel.shard import Run, plainly, shard_weights, whole
from ernie45.plan.split import Weight, split_text
from ernie45.quant.fp8_training import train_in_fp8
from ernie45.quant.frozen import freeze, thaw
from ernie45.quant.qat import pack_trained, prepare_training
from ernie45.quant.spec import QuantSpec, Rule
from ernie45.recipes.events import Events
from ernie45.recipes.seeing import open_gallery
from ernie45.tokens.template import ChatTemplate, load_template
from ernie45.tokens.tokenizer import Tokenizer, load_tokenizer
from ernie45.train.batch import Example
from ernie45.train.examples import Batch
from ernie45.train.forward import with_pictures
from ernie45.train.optim import OptimiserConfig
from ernie45.train.recompute import Offload, choose, computed_again, measure
from ernie45.train.schedule import ScheduleConfig
from ernie45.train.sighted import Gallery, PictureConfig
from ernie45.train.stages import Stage, choose_learning
from ernie45.train.step import LossConfig, StepReport

WITHOUT_EFFECT = (
    "out",
    "save_every",
    "dry_run",
    "layout",
    "skip_bad",
    "recompute",
    "samples",
    "sample_tokens",
    "tensorboard",
    "rank_timeout",
    "shard",
    "keep_gb",
    "offload",
    "held_out",
    "eval_every",
    "shelf_mb",
)
"""Settings that do not change what is learned: a run may go on with others."""
_QUIET_STEPS = 10
"""Steps between two lines where the error stream is no terminal."""


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """How any training runs."""

    out: Path
    """Folder of the run; a run that was stopped goes on where its last checkpoint stands."""
    steps: int | None = None
    """Optimiser steps; by default what the epochs need."""
    epochs: int = 1
    """Times the data is seen, unless `steps` says otherwise."""
    batch_tokens: int = 2048
    """Tokens that go through the model at once; no example may be longer."""
    accumulate: int = 1
    """Batches per step, of all ranks together; with several ranks at least one for each."""
    seed: int = 0
    """Of the order of the data and the first values of adapters."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed in."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """In what feed-forward layers multiply, forward and backward: as `dtype` says, or FP8 numbers (E4M3) with a scale for each 128. All
    weights learn then (`--lora.rank 0`). On a CPU it is emulated: what FP8 would learn, slowly."""
    recompute: bool = False
    """Keep only each layer's input and compute the layer again in backward: less memory, a third more work."""
    keep_gb: float | None = None
    """Gigabytes of intermediate values kept for backward, in memory: parts of layers are computed again, those first that free most bytes
    for a second, until the rest fits. By default all is kept."""
    offload: Literal["none", "activations", "optimiser", "both"] = "none"
    """What lies in files in the run's folder instead of in memory: intermediate values, or masters and state of the optimiser."""
    stage: Stage = "joint"
    """Which weights learn: `text` the language model, `sight` vision tower and resampler, `vision` the vision experts too, `joint` all."""
    freeze: tuple[str, ...] = ()
    """Names of weights that do not learn, as patterns: `embed.*`, `sight.tower.*`, `layers.[0-3].*`."""
    save_every: int = 500
    """Steps between checkpoints."""
    shelf_mb: int = 256
    """Megabytes of pictures that are kept between batches; others are read again from their files."""
    skip_bad: bool = False
    """Count rows that cannot be learned from instead of ending."""
    samples: tuple[str, ...] = ()
    """Texts that the model continues, or questions that it answers, at each checkpoint."""
    sample_tokens: int = 64
    """Most tokens of one sample."""
    tensorboard: bool = False
    """Write the numbers as TensorBoard events too, into `tensorboard/` of the run."""
    shard: Literal["none", "weights"] = "none"
    """With several ranks: every rank has the whole model, or a share of the weights, gradients and optimiser state."""
    rank_timeout: float = 600.0
    """Seconds that a rank of several waits for a silent one before the run ends."""
    dry_run: bool = False
    """Say what would be done, and stop."""
    layout: Layout = field(default_factory=Layout)
    """Ranks along other axes than data: with `dry_run` what each would hold; training splits by `shard` alone."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """How gradients become steps."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
    losses: LossConfig = field(default_factory=LossConfig)
    """What is learned beside the next token."""
    pictures: PictureConfig = field(default_factory=PictureConfig)
    """How the pictures of rows are read."""

    def __post_init__(self) -> None:
        least_of = {"steps": 1, "epochs": 1, "batch_tokens": 2, "accumulate": 1, "save_every": 1, "sample_tokens": 1, "shelf_mb": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, not {value}")
        if self.keep_gb is not None and not (math.isfinite(self.keep_gb) and self.keep_gb >= 0):
            raise ConfigError(f"keep_gb must be a number of gigabytes of at least 0, not {self.keep_gb}")
        if self.keep_gb is not None and self.recompute:
            raise ConfigError("recompute keeps nothing but the inputs of layers, and keep_gb says how much to keep; give one of the two")
        if self.keep_gb is not None and self.shard != "none":
            raise ConfigError("keep_gb is measured on a whole model, and ranks that share the weights have none; take --recompute there")
        if self.layout.ranks > 1 and not self.dry_run:
            raise ConfigError("a layout is only planned so far: --dry-run prints what each rank would hold; train with --shard weights")
        if self.offload != "none" and self.shard != "none":
            raise ConfigError(f"offload {self.offload} is for ranks that have the whole model; take --shard none, or --offload none")
        if not (math.isfinite(self.rank_timeout) and self.rank_timeout > 0):
            raise ConfigError(f"rank_timeout must be a number of seconds above 0, not {self.rank_timeout}")


@dataclass(frozen=True)
class Pupil:
    """A model that is to learn, with its tokenizer, and the processes that teach it."""

    loaded: LoadedModel
    tokenizer: Tokenizer
    ranks: Ranks = ALONE
    spec: QuantSpec | None = None
    """How the result is packed; None: floats."""

    @property
    def decoder(self) -> Decoder:
        """The network."""
        return self.loaded.decoder

    @property
    def folder(self) -> Path:
        """Where it came from."""
        return self.loaded.opened.path

    @property
    def vision(self) -> VisionConfig | None:
        """Its seeing half; None for a text model."""
        return self.decoder.sight.config if self.decoder.sight is not None else None

    def template(self, chat_format: str | None) -> ChatTemplate:
        """How its conversations are written."""
        return load_template(self.folder, self.tokenizer, chat_format)

    def gallery(self, config: LearningConfig) -> Gallery | None:
        """What reads the pictures of its rows; None for a text model."""
        return open_gallery(self.folder, self.vision, config.pictures, config.shelf_mb)


def open_pupil(model: str, dtype: str, environment: Environment, ranks: Ranks = ALONE) -> Pupil:
    """Load a model folder to be trained. Raises CheckpointError for a single file, which has no tokenizer beside it."""
    loaded = load(model, dtype=dtype, environment=environment)
    if not loaded.opened.path.is_dir():
        raise CheckpointError(f"{loaded.opened.path}: training needs a model folder with its tokenizer, not a single file")
    decoder = loaded.decoder.train()
    freeze(decoder)
    choose_learning(decoder, "joint")
    return Pupil(loaded, load_tokenizer(loaded.opened.path), ranks, loaded.opened.spec)


def through_rounding(pupil: Pupil, layers: str, head: str, online: int) -> Pupil:
    """The pupil with every matrix learning through the rounding of a scheme; its result will be packed so. Raises ConfigError as specs do.

    online: batches until static FP8 activations take the scale that was found. A vision tower and resampler stay whole. Schemes without a
    group get groups of 64 and turned inputs (`models.on_the_fly.completed`).
    """
    decoder = pupil.decoder
    rules = [Rule(pattern="embed" if decoder.head is None else "head", scheme=completed(head))]
    if decoder.sight is not None:
        rules.append(Rule(pattern="sight.*", scheme=None))
    spec = QuantSpec(rules=(*rules, Rule(pattern="*", scheme=completed(layers))))
    prepare_training(decoder, spec, online=online)
    return replace(pupil, spec=spec)


def spread(pupil: Pupil, samples: Sequence[str]) -> Run:
    """How passes of the pupil are run; with ranks that share the weights, this one keeps its share from here on.

    Raises ConfigError for packed matrices and for samples, which need the whole model in one place.
    """
    if not pupil.ranks.sharded:
        return plainly
    if pupil.spec is not None:
        raise ConfigError(f"{pupil.folder} is quantised or is to be, and such weights are not shared out; take --shard none")
    if samples:
        raise ConfigError("samples are written by a whole model, and no rank has one; leave them out, or take --shard none")
    return shard_weights(pupil.decoder, pupil.ranks)


def in_precision(config: LearningConfig, pupil: Pupil) -> None:
    """Let the pupil's feed-forward layers learn in FP8 where `config` says so. Raises ConfigError where nothing of them would."""
    if config.precision == "fp8":
        refuse_packed(pupil, "take the original model")
        train_in_fp8(pupil.decoder)


def state_folder(config: LearningConfig) -> Path | None:
    """Where masters and state of the optimiser lie; None: in memory."""
    return config.out if config.offload in ("optimiser", "both") else None


def keeping(config: LearningConfig, pupil: Pupil) -> Callable[[], AbstractContextManager[None]]:
    """What is put around forward and backward of a batch, so that saved values lie where `config` wants them."""
    return Offload(pupil.decoder, config.out) if config.offload in ("activations", "both") else nullcontext


@contextmanager
def within_memory(config: LearningConfig, pupil: Pupil, way: Run, batch: Batch) -> Iterator[float]:
    """While it lasts, the pupil's layers keep no more for backward than `config.keep_gb`, measured on the batch's tokens as one document.

    Gives the share of the layers' forward pass that is computed a second time.
    """
    if config.keep_gb is None:
        yield float(config.recompute)
        return
    decoder, tokens_T, seen = pupil.decoder, batch.tokens_T, batch.seen

    def forward() -> Tensor:
        x_TD = with_pictures(decoder, decoder.embed(tokens_T), tokens_T, seen, recompute=False)
        vision_T = None if seen is None else seen.vision_T
        return decoder(x_TD, torch.arange(len(tokens_T)), PackedCausal([len(tokens_T)]), vision_T)

    parts = measure(decoder, lambda: way(forward))
    again = choose(parts, int(config.keep_gb * 1e9))
    if pupil.ranks.is_first:
        size, left = sum(part.bytes for part in parts), sum(part.bytes for part in parts if part not in again)
        print(f"kept for backward: {left / 1e9:.3f} of {size / 1e9:.3f} GB; {len(again)} of {len(parts)} parts of layers computed again")
    with computed_again(decoder, again):
        yield sum(part.seconds for part in again) / sum(part.seconds for part in parts)


def put_together(pupil: Pupil, weights: Mapping[str, Tensor]) -> None:
    """Give the pupil of the first rank these weights, whole, so that it can be written. All ranks must call it, after the last pass."""
    for name, weight in weights.items():
        together = whole(weight.detach())
        if pupil.ranks.is_first:
            module, _, last = name.rpartition(".")
            together = together.to(pupil.decoder.get_parameter(name).dtype)
            setattr(pupil.decoder.get_submodule(module), last, nn.Parameter(together, requires_grad=False))


def refuse_packed(pupil: Pupil, advice: str) -> None:
    """Raise ConfigError when the pupil's matrices are packed, and so cannot learn themselves."""
    if pupil.loaded.opened.spec is not None:
        raise ConfigError(f"{pupil.folder} is quantised, and packed weights do not learn; {advice}")


class BadRows:
    """Counts rows that are left out, and says which, on the first rank."""

    SHOWN = 5

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.errors: list[DataError] = []
        self._speaks = ranks.is_first

    def __call__(self, error: DataError) -> None:
        """Take one in."""
        self.errors.append(error)
        if self._speaks and len(self.errors) <= self.SHOWN:
            print(f"left out: {error}", file=sys.stderr)


def plan_text(decoder: Decoder, facts: Mapping[str, object], ranks: Ranks = ALONE, means: str = "float32") -> str:
    """The plan, a fact a line: parameters, memory of a rank without activations, then `facts`; means: the type of the optimiser's."""
    kinds: Counter[bool] = Counter()
    held = 0
    on_every_rank = {id(p) for part in decoder.modules() if isinstance(part, Router) or not ranks.sharded for p in part.parameters()}
    for parameter in decoder.parameters():
        kinds[parameter.requires_grad] += parameter.numel()
        held += parameter.numel() * _bytes_each(parameter, means) / (1 if id(parameter) in on_every_rank else ranks.world)
    shared = f" on each of {ranks.world} ranks" if ranks.sharded else ""
    lines = {
        "parameters": f"{sum(kinds.values()):,}, of which {kinds[True]:,} learn",
        "memory": f"{held / 1e9:.2f} GB{shared} for weights, gradients and optimiser; activations come on top",
        **facts,
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {fact:,}" if isinstance(fact, int) else f"{name:<{width}}  {fact}" for name, fact in lines.items())


def _bytes_each(parameter: Tensor, means: str) -> int:
    """Of one number: itself, and where it learns its gradient, two means, and what it lacks of float32."""
    size = parameter.element_size()
    return 4 + size + 2 * getattr(torch, means).itemsize if parameter.requires_grad else size


def show_plan(config: LearningConfig, pupil: Pupil, facts: Mapping[str, object]) -> None:
    """Print the plan, and how the model splits over the ranks of a layout, on the first rank. Raises ConfigError where it cannot."""
    if not pupil.ranks.is_first:
        return
    print(plan_text(pupil.decoder, facts, pupil.ranks, config.optimiser.state))
    if config.layout.ranks > 1:
        weights = [Weight(name, tuple(p.shape), _bytes_each(p, config.optimiser.state)) for name, p in pupil.decoder.named_parameters()]
        print(split_text(weights, pupil.decoder.model_config, config.layout, config.batch_tokens))


class Watcher:
    """Shows steps on the error stream: one line that moves at a terminal, every tenth step elsewhere; hands them to `events` too."""

    def __init__(self, steps: int, events: Events | None = None) -> None:
        self.steps, self.events, self.live = steps, events, sys.stderr.isatty()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        if self.events is not None:
            self.events.close()

    def __call__(self, report: StepReport) -> None:
        """Show one step."""
        if self.events is not None:
            self.events(report)
        last = report.step + 1 == self.steps
        if not self.live and not last and report.step % _QUIET_STEPS:
            return
        speed = report.tokens / max(report.seconds, 1e-9)
        left = (self.steps - report.step - 1) * report.seconds
        text = f"step {report.step + 1}/{self.steps}  loss {report.loss:.4f}  rate {report.rate:.2e}  norm {report.norm:.2f}"
        text += f"  {speed:,.0f} tok/s" + (f"  MFU {report.mfu:.1%}" if report.mfu is not None else "")
        text += f"  held out {report.held_out_loss:.4f}" if report.held_out_loss is not None else ""
        text += f" ({report.held_out_accuracy:.0%} right)" if report.held_out_accuracy is not None else ""
        text += f"  {left / 60:.1f} min left" + ("  SKIPPED: gradient not finite" if report.skipped else "")
        print(f"\r\x1b[K{text}" if self.live else text, end="\n" if last or not self.live else "", file=sys.stderr, flush=True)


def prepare(out: Path) -> None:
    """Make the run folder. Raises RunError when a finished run is there."""
    if (out / "model").exists():
        raise RunError(f"{out}: a finished run is there (model/); choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error.strerror or error}") from error


def plain_settings(config: Any, *without: str) -> dict[str, Any]:
    """A config as plain data, paths as texts, without the settings that do not change what is learned."""
    return {name: value for name, value in json.loads(json.dumps(asdict(config), default=str)).items() if name not in without}


def ids_of(example: Example) -> tuple[int, ...]:
    """What the fingerprint of a run knows of an example: its ids, and its pictures by their digests."""
    return (*example.ids, *(int.from_bytes(picture.digest) for picture in example.pictures))


def digest_of_ids(rows: Iterable[tuple[int, ...]]) -> str:
    """A digest of all ids of the data, for the fingerprint of a run."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(repr(row).encode())
    return hashed.hexdigest()


def write_result(pupil: Pupil, target: Path, lora: LoraConfig | None, card: str) -> Path:
    """The trained model as the folder `target`, stored as the one it came from, packed too, with its companions and a card.

    With `lora` the adapters go to `adapter/` beside it and are merged into the model.
    """
    if lora is not None:
        if not (target.parent / "adapter").exists():
            save_adapter(pupil.decoder, target.parent / "adapter", lora, str(pupil.folder))
        merge(pupil.decoder)
    opened = pupil.loaded.opened
    if opened.spec is not None:
        thaw(pupil.decoder)
        save_packed(pupil.decoder.eval(), target, opened.spec, made_by="adapters merged and rounded to nearest", companions=pupil.folder)
    elif pupil.spec is not None:
        pack_trained(pupil.decoder)
        save_packed(pupil.decoder.eval(), target, pupil.spec, made_by="quantisation-aware training", companions=pupil.folder)
    else:
        dtype = opened.stored if opened.stored.is_floating_point else None
        save_model(pupil.decoder.eval(), target, dtype=dtype, companions=pupil.folder)
    (target / "README.md").write_text(card, "utf-8")
    return target
