"""A model quantised layer by layer in bounded memory, into shards that are final as they are written.

Four streams of hidden states walk through the layers together: the calibration text and the held-out text, each through the original layers
and through the quantised ones. So one reading of the original weights serves the statistics,
the measurement before and the measurement after, and only one layer of floats is in memory. After each layer its shard and the streams are
put on the disk; a run that was killed goes on there. Of a model that sees, calibration may hold scenes, sequences with pictures in them.

Letters: S sequences, L their length, D width, P rotary pairs.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ernie45.config import from_mapping
from ernie45.errors import CheckpointError
from ernie45.nn.block import Block
from ernie45.nn.rope import turns, turns_of_places
from ernie45.quant.calibrate import advance, advance_original, token_weights
from ernie45.quant.measure import LayerReport, Quality, QualityCounter
from ernie45.quant.methods import MatrixReport, Method, Streams, quantise_block
from ernie45.quant.model import quantisable, quantise_model
from ernie45.quant.spec import AnyScheme, QuantSpec, Rule
from ernie45.quant.watched import quantise_watched
from ernie45.weights.safetensors import INDEX_NAME, SINGLE_NAME, open_safetensors
from ernie45.weights.safetensors_write import TensorSpec, write_safetensors

_STATE = "state.json"
_STREAMS = "streams"


class Ends(Protocol):
    """A network without layers: tokens to hidden states, and hidden states to logits."""

    def embed(self, tokens_T: Tensor) -> Tensor:
        """[T] -> [T, D]."""
        ...

    def logits(self, h_RD: Tensor) -> Tensor:
        """[R, D] -> [R, V]."""
        ...


class Eyes(Protocol):
    """What makes tokens of pictures, as `models.vision.Sight`."""

    def encode(self, patches_SC: Tensor, *grids: Sequence[int]) -> Tensor:
        """Patches of pictures, one behind the other, to features [F, D]."""
        ...

    def put(self, embedding_TD: Tensor, tokens_T: Tensor, features_FD: Tensor) -> Tensor:
        """The embedding with the features in their places."""
        ...


@dataclass(frozen=True)
class Scene:
    """A calibration sequence with pictures: ids [L], patches of all pictures [S, C] and their grids, positions [L, 3], seen tokens [L]."""

    tokens_L: Tensor
    patches_SC: Tensor
    grids: tuple[tuple[int, int, int], ...]
    positions_L3: Tensor
    seen_L: Tensor


class Source(Protocol):
    """The original model, part by part in float32."""

    @property
    def num_layers(self) -> int:
        """Layers of the trunk."""
        ...

    @property
    def frequencies(self) -> Tensor:
        """Rotary frequencies."""
        ...

    @property
    def axes(self) -> Tensor:
        """Which of three positions each frequency turns with."""
        ...

    def empty_block(self, layer: int) -> Block:
        """Layer `layer` without weights, on the meta device."""
        ...

    def block(self, layer: int) -> Block:
        """Layer `layer`, newly read."""
        ...

    def ends(self, *, sight: bool = True) -> nn.Module:
        """Everything but the trunk's layers, newly read; has the methods of `Ends`, and an empty `layers`.

        `sight=False` leaves out a vision tower and resampler, which text does not pass.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done. `fingerprint` tells runs apart: a run goes on only where one with the same fingerprint was stopped.

    `scenes` are as long as the windows of the calibration text; without any, what sees is rounded to nearest.
    """

    spec: QuantSpec
    method: Method
    calibration_SL: Tensor
    held_out_SL: Tensor
    least_expert_tokens: int
    fingerprint: str
    scenes: tuple[Scene, ...] = ()


@dataclass(frozen=True)
class Converted:
    """The result: shards in `work`, with their index, and what they cost; `sight` are the matrices of tower and resampler that pictures
    calibrated."""

    work: Path
    quality: Quality
    layers: tuple[LayerReport, ...]
    nbytes: int
    resumed_at: int
    sight: tuple[MatrixReport, ...] = ()


Told = Callable[[str, int, int], None]
"""Hears what is being done, and how many parts are done of how many."""


def convert(source: Source, plan: Plan, work: Path, told: Told) -> Converted:
    """Write the packed shards and their index into `work`, or go on with what a killed run left there.

    Raises `ConfigError` when the spec's rules and the model's matrices do not meet, `CheckpointError` for weights or activations that are
    no numbers, and when the disk is full. `work` is left as it is then: nothing in it is mistaken for a model.
    """
    total = source.num_layers + 2
    told("embedding and head", 0, total)
    packed = source.ends()
    schemes = decided(source, packed, plan.spec)
    original = source.ends(sight=bool(plan.scenes))
    seen: tuple[MatrixReport, ...] = ()
    if plan.scenes and plan.method.spread:
        told("vision tower", 0, total)
        seen = quantise_watched(packed, "sight", [partial(_features, packed, scene) for scene in plan.scenes], schemes, plan.method)
    quantise_model(packed, _explicit(packed, schemes))
    walk = _Walk.start_or_resume(source, plan, work, original, packed)
    resumed_at = walk.done
    if not walk.done:
        _write_shard(work, 0, source.num_layers, dict(packed.state_dict()))
    for layer in range(walk.done, source.num_layers):
        told(f"layer {layer}", layer + 1, total)
        walk.pass_layer(layer, schemes)
    told("measuring", source.num_layers + 1, total)
    quality = _measure(original, packed, walk, plan.held_out_SL)
    nbytes = _write_index(work, source.num_layers)
    return Converted(work, quality, tuple(walk.reports), nbytes, resumed_at, seen)


def decided(source: Source, ends: nn.Module, spec: QuantSpec) -> dict[str, AnyScheme | None]:
    """What every matrix of the model gets, by full name. Raises `ConfigError` for a rule without a matrix or a matrix without a rule."""
    names = [name for name, _ in quantisable(ends)]
    for layer in range(source.num_layers):
        names += [f"layers.{layer}.{name}" for name, _ in quantisable(source.empty_block(layer))]
    spec.check(names)
    return {name: spec.scheme_for(name) for name in names}


def _explicit(ends: nn.Module, schemes: Mapping[str, AnyScheme | None]) -> QuantSpec:
    """A spec that speaks of the ends alone."""
    named = [(name, schemes[name]) for name, _ in quantisable(ends)]
    return QuantSpec(rules=tuple(Rule(pattern=name, scheme=None if scheme is None else str(scheme)) for name, scheme in named))


class _Walk:
    """The streams, how many layers they have passed, and the reports so far."""

    def __init__(self, source: Source, plan: Plan, work: Path) -> None:
        self.source, self.plan, self.work = source, plan, work
        self.turns_LP = turns(torch.arange(max(plan.calibration_SL.shape[1], plan.held_out_SL.shape[1])), source.frequencies)
        self.calibration_turns, self.seen_SL = self.turns_LP[: plan.calibration_SL.shape[1]], None
        if plan.scenes:
            texts_SLP = self.calibration_turns.expand(len(plan.calibration_SL), -1, -1)
            scenes_SLP = torch.stack([turns_of_places(scene.positions_L3, source.frequencies, source.axes) for scene in plan.scenes])
            self.calibration_turns = torch.cat((texts_SLP, scenes_SLP))
            none_SL = torch.zeros_like(plan.calibration_SL, dtype=torch.bool)
            self.seen_SL = torch.cat((none_SL, torch.stack([scene.seen_L for scene in plan.scenes])))
        self.done = 0
        self.reports: list[LayerReport] = []
        self.streams: dict[str, Tensor] = {}

    @classmethod
    @torch.inference_mode()
    def start_or_resume(cls, source: Source, plan: Plan, work: Path, original: nn.Module, packed: nn.Module) -> "_Walk":
        """Take up what is in `work` when it is of the same run and whole; else begin anew there."""
        walk = cls(source, plan, work)
        if walk._take_up():
            return walk
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        text = {"calibration": plan.calibration_SL, "held_out": plan.held_out_SL}
        walk.streams = {
            "reference": embedded(original, text["held_out"]),
            "quantised": embedded(packed, text["held_out"]),
        }
        if plan.method.needs_text:
            for name, ends in (("calibration", packed), ("calibration_reference", original)):
                scenes = [_embedded_scene(ends, scene)[None] for scene in plan.scenes]
                walk.streams[name] = torch.cat((embedded(ends, text["calibration"]), *scenes))
        return walk

    @torch.inference_mode()
    def pass_layer(self, layer: int, schemes: Mapping[str, AnyScheme | None]) -> None:
        """Quantise one layer, move all streams past it, and put shard and streams on the disk."""
        block, where = self.source.block(layer), f"layers.{layer}"
        advance_original(block, self.streams["reference"], self._turns("reference"), where)
        seen: Streams | None = None
        if self.plan.method.needs_text:
            before = self.streams["calibration_reference"].clone()
            advance_original(block, self.streams["calibration_reference"], self.calibration_turns, where, self.seen_SL)
            weights_SL = token_weights(self.streams["calibration_reference"])
            least = self.plan.least_expert_tokens
            seen = Streams(self.streams["calibration"], before, self.calibration_turns, least, weights_SL, self.seen_SL)
        packed, matrices = quantise_block(block, where, schemes, self.plan.method, seen)
        advance(packed, self.streams["quantised"], self._turns("quantised"))
        if "calibration" in self.streams:
            advance(packed, self.streams["calibration"], self.calibration_turns, self.seen_SL)
        self.reports.append(LayerReport(layer, _drift(self.streams), tuple(matrices)))
        _write_shard(self.work, layer + 1, self.source.num_layers, {f"{where}.{k}": v for k, v in packed.state_dict().items()})
        self.done = layer + 1
        self._keep()

    def _turns(self, name: str) -> Tensor:
        return self.turns_LP[: self.streams[name].shape[1]]

    def _keep(self) -> None:
        """Streams first, then the state that names them: a kill between the two leaves the older state, whose streams are still there."""
        place = self.work / f"{_STREAMS}-{self.done}"
        shutil.rmtree(place, ignore_errors=True)
        specs = [TensorSpec(name, stream.dtype, tuple(stream.shape)) for name, stream in self.streams.items()]
        write_safetensors(place, specs, self.streams.__getitem__)
        state = {"fingerprint": self.plan.fingerprint, "done": self.done, "reports": [asdict(report) for report in self.reports]}
        _write_text(self.work / _STATE, json.dumps(state))
        shutil.rmtree(self.work / f"{_STREAMS}-{self.done - 1}", ignore_errors=True)

    def _take_up(self) -> bool:
        try:
            state = json.loads((self.work / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        shards = [self.work / _shard_name(number, self.source.num_layers) for number in range(state["done"] + 1)]
        if state["fingerprint"] != self.plan.fingerprint or not all(shard.is_file() for shard in shards):
            return False
        self.done = state["done"]
        self.reports = [_report(data) for data in state["reports"]]
        with open_safetensors(self.work / f"{_STREAMS}-{self.done}") as files:
            self.streams = {name: files.read(name).clone() for name in files}
        return True


def _report(data: Mapping[str, Any]) -> LayerReport:
    matrices = tuple(from_mapping(MatrixReport, matrix, "report") for matrix in data["matrices"])
    return LayerReport(data["layer"], data["drift"], matrices)


def embedded(ends: nn.Module, tokens_SL: Tensor) -> Tensor:
    """Hidden states that enter the first layer, float32 [S, L, D]."""
    return torch.stack([cast(Ends, ends).embed(tokens_L).float() for tokens_L in tokens_SL])


def _features(ends: nn.Module, scene: Scene) -> Tensor:
    return cast(Eyes, ends.sight).encode(scene.patches_SC, *scene.grids)


def _embedded_scene(ends: nn.Module, scene: Scene) -> Tensor:
    """Hidden states of one scene, float32 [L, D]."""
    x_LD = cast(Ends, ends).embed(scene.tokens_L)
    return cast(Eyes, ends.sight).put(x_LD, scene.tokens_L, _features(ends, scene)).float()


def _drift(streams: Mapping[str, Tensor]) -> float:
    """Energy of the difference over the energy of the reference."""
    lost, energy = 0.0, 0.0
    for reference, quantised in zip(streams["reference"], streams["quantised"], strict=True):
        lost += float((quantised - reference).square().sum(dtype=torch.float64))
        energy += float(reference.square().sum(dtype=torch.float64))
    return lost / (energy or 1.0)


@torch.inference_mode()
def _measure(original: nn.Module, packed: nn.Module, walk: _Walk, held_out_SL: Tensor) -> Quality:
    counter = QualityCounter()
    for tokens_L, reference_LD, quantised_LD in zip(held_out_SL, walk.streams["reference"], walk.streams["quantised"], strict=True):
        for begin in range(0, len(tokens_L) - 1, 128):  # logits of a large vocabulary are made a few rows at a time
            rows = slice(begin, min(begin + 128, len(tokens_L) - 1))
            following_R = tokens_L[rows.start + 1 : rows.stop + 1]
            counter.add(cast(Ends, original).logits(reference_LD[rows]), cast(Ends, packed).logits(quantised_LD[rows]), following_R)
    return counter.quality()


def _shard_name(number: int, num_layers: int) -> str:
    return f"model-{number + 1:05d}-of-{num_layers + 1:05d}.safetensors"


def _write_shard(work: Path, number: int, num_layers: int, tensors: Mapping[str, Tensor]) -> None:
    """One shard under its final name, whole or not at all."""
    place = work / "writing"
    shutil.rmtree(place, ignore_errors=True)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(place, specs, tensors.__getitem__, shard_bytes=1 << 62)
    (place / SINGLE_NAME).replace(work / _shard_name(number, num_layers))
    place.rmdir()


def _write_index(work: Path, num_layers: int) -> int:
    """The index of the shards; returns the bytes of all tensors."""
    listed: dict[str, str] = {}
    total = 0
    for number in range(num_layers + 1):
        name = _shard_name(number, num_layers)
        with open_safetensors(work / name) as files:
            listed |= dict.fromkeys(files, name)
            total += sum(files.info(tensor).nbytes for tensor in files)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
    _write_text(work / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return total


def _write_text(path: Path, text: str) -> None:
    """The file, whole or as it was before. Raises `CheckpointError` when the disk refuses."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}; free some room and run again to go on") from error


def leave_only_model(work: Path) -> None:
    """Remove from `work` what was only needed to go on after a kill."""
    (work / _STATE).unlink(missing_ok=True)
    for place in work.glob(f"{_STREAMS}-*"):
        shutil.rmtree(place)
