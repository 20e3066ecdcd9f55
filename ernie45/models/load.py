"""From a name, a folder or a GGUF file to a running `Decoder`, without a second copy of the weights.

Decided first, done after: `open_model` reads the config and the names and shapes, and says where every tensor goes or why the files
do not make the model; only then is data touched. The decoder is built on the meta device and its parameters are put in place, many of
them as views of the mapped file.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie45 import ops
from ernie45.config import Environment
from ernie45.errors import CheckpointError
from ernie45.machine import available_memory
from ernie45.models.compute import ComputeType, choose_compute, cpu_has_bfloat16
from ernie45.models.config import TextConfig
from ernie45.models.gguf_config import config_from_gguf
from ernie45.models.memory import Held, advice, gib
from ernie45.models.names import FLOAT32_ENDINGS, detect_layout, has_mtp, head_name, name_table, without_head, without_mtp, without_sight
from ernie45.models.packed import packed_dtype, packed_spec, packed_table, without_rules_for_mtp, without_rules_for_sight
from ernie45.models.released import CHECKPOINTS, Release
from ernie45.models.sighted import SIGHTED_NAME, sighted_folder
from ernie45.models.starter import STARTER_NAME, starter_folder
from ernie45.models.text import Decoder
from ernie45.models.vision_config import ModelConfig, PositionRule, VisionConfig
from ernie45.quant.model import prepare_model
from ernie45.quant.spec import QuantSpec
from ernie45.weights.foreign import DecodedFiles
from ernie45.weights.gguf import GgufFile, open_gguf
from ernie45.weights.hub import resolve
from ernie45.weights.rename import Ignored, LoadPlan, Shape
from ernie45.weights.safetensors import TensorFiles, open_safetensors
from ernie45.weights.stream import Progress, load_pieces

MAX_CONFIG = 10_000_000
_ROOMY = 0.7  # of the available memory: the rest is for the cache and the work
_LARGE_PACKED = 4 << 30  # bytes: copying them would take seconds before the first token, and what is packed needs no change
"""Bytes of a config.json."""
MAX_WIDTH = 1 << 20
"""Largest width that is believed; released models stay below 110,000. Products of three such stay far from overflow."""
_QUANTISED_ENDINGS = (
    "quant_weight",
    "weight_scale",
    "weight_scale_inv",
    "activation_scale",
    "super_scales",
    "code_scale",
    "code_zp",
    "qweight",
)


@dataclass(frozen=True)
class OpenModel:
    """A model whose files are open and whose plan is made; no data has been read."""

    path: Path
    config: TextConfig
    layout: str
    files: TensorFiles | DecodedFiles | GgufFile
    plan: LoadPlan
    stored: torch.dtype
    """The type that most elements are stored in; bfloat16 for a quantised GGUF, whose blocks are coarser than that."""
    notes: tuple[str, ...] = ()
    """What was decided beyond the config, in plain sentences."""
    spec: QuantSpec | None = None
    """Which modules are packed and how; None for a float model."""
    vision: VisionConfig | None = None
    """The seeing half that will be loaded; None for a text model, and for a vision-language model of which only text was asked for."""
    unseen: str = ""
    """What `text_only` left in the files, as a sentence that is among the notes too; empty where nothing was."""

    @property
    def described(self) -> ModelConfig:
        """The whole model that will be loaded."""
        return ModelConfig(self.config, self.vision)

    def complaint(self) -> str:
        """Why the files do not make the model, with what to do; empty when they do."""
        if self.plan.complete:
            return ""
        return "\n".join([f"{self.path}: the tensors in its files are not those of its config:", self.plan.explain(), *_advice(self.plan)])


@dataclass(frozen=True)
class LoadedModel:
    """A decoder that runs, with what was decided on the way."""

    decoder: Decoder
    compute: ComputeType
    opened: OpenModel


Approve = Callable[[OpenModel, ComputeType, Held], None]
"""Hears of a model that is about to be read, its compute type, and what its weights will take."""


def load(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    mtp: bool = True,
    text_only: bool = False,
    positions: PositionRule = "original",
    mapped: bool | None = None,
    compact: bool = False,
    check: bool = True,
    progress: Progress | None = None,
    approve: Approve | None = None,
    environment: Environment | None = None,
) -> LoadedModel:
    """`load_model` with what was decided on the way. approve: called with the weights' bytes before one is read; it raises to refuse."""
    path = find_model(name_or_path, environment or Environment.read())
    opened = open_model(path, mtp=mtp, text_only=text_only, positions=positions)
    if not opened.plan.complete:
        raise CheckpointError(opened.complaint())
    coarse = compact and opened.spec is not None and opened.spec.rounds_activations
    compute = choose_compute(dtype, opened.stored, fast_bfloat16=cpu_has_bfloat16(), coarse=coarse)
    decoder = _empty_decoder(opened.described, opened.spec, compute.dtype)
    kept = _exact_in_bfloat16(opened) if compact and compute.dtype == torch.float32 and ops.KERNELS else frozenset()
    if kept:
        compute = replace(compute, reason=f"{compute.reason}; matrices held as they are stored, which changes no result")

    def dtype_of(name: str) -> torch.dtype:
        return torch.bfloat16 if name in kept else packed_dtype(name, compute.dtype)

    shapes = _shapes(decoder)
    held = _held(opened, sum(math.prod(shape) * dtype_of(name).itemsize for name, shape in shapes.items()), dtype_of, mapped)
    if approve is not None:
        approve(opened, compute, held)
    with opened.files as files:
        if opened.plan.ignored.get(head_name(opened.layout)):
            _check_tied_head(opened)
        source = files if not isinstance(files, GgufFile) else _Decoded(files, {p.file: dtype_of(p.ours) for p in opened.plan.pieces})
        _refuse_what_cannot_fit(opened, held, compute.dtype.itemsize)
        state = load_pieces(opened.plan, source, shapes, dtype_of, mapped=held.mapped > 0, check=check, progress=progress)
    decoder.load_state_dict(state, assign=True)
    if "embed.weight" in kept:
        decoder.embed.dtype = compute.dtype
    return LoadedModel(decoder.eval(), compute, opened)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str = "auto",
    mtp: bool = True,
    text_only: bool = False,
    positions: PositionRule = "original",
    mapped: bool | None = None,
    compact: bool = False,
    check: bool = True,
    progress: Progress | None = None,
    environment: Environment | None = None,
) -> Decoder:
    """Load a model by folder, `.gguf` file, Hub name (`baidu/ERNIE-4.5-0.3B-PT`), short name (`0.3B`) or `starter`.

    `dtype`: "auto", "float32" or "bfloat16" (`compute.choose_compute` has the rule). `mtp=False` leaves a multi-token prediction block in
    the file. Of a vision-language model `text_only` leaves vision tower, resampler and vision experts there too (`load` says how much
    memory that saves), and `positions` chooses where positions go on after a long video: "original", as the model was trained, or
    "transformers". `mapped` keeps weights in the mapped file where they need no change; None does so only when memory is short.
    `compact` is for inference. A packed model whose matrices round activations then computes in bfloat16 where it is fast. In float32,
    where the native kernels are installed, matrices stored as bfloat16 are held so, in half the
    bytes and with the same results, since the kernels widen them exactly; training needs real float32 parameters.
    `check` refuses NaN and infinite weights. Raises CheckpointError, naming file and tensor, for anything that does not fit.
    """
    return load(
        name_or_path,
        dtype=dtype,
        mtp=mtp,
        text_only=text_only,
        positions=positions,
        mapped=mapped,
        compact=compact,
        check=check,
        progress=progress,
        environment=environment,
    ).decoder


def _exact_in_bfloat16(opened: OpenModel) -> frozenset[str]:
    """The matrices that are stored as bfloat16 in every file tensor they are made of, save the router's, which torch multiplies."""
    if opened.spec is not None or not isinstance(opened.files, TensorFiles):
        return frozenset()
    other = {p.ours for p in opened.plan.pieces if opened.files.info(p.file).dtype not in (torch.bfloat16, torch.uint16)}
    matrices = {p.ours for p in opened.plan.pieces if len(p.box) > 1 and not p.ours.endswith(FLOAT32_ENDINGS)}
    return frozenset(matrices - other)


@dataclass(frozen=True)
class _Decoded:
    """A GGUF file whose blocks are decoded straight into the type they are wanted in, not into float32 first."""

    file: GgufFile
    dtypes: Mapping[str, torch.dtype]
    owned: bool = True

    def read(self, name: str) -> Tensor:
        return self.file.read(name, self.dtypes[name])

    def release(self, name: str) -> None:
        self.file.release(name)


def find_model(name_or_path: str | Path, environment: Environment, tell: Callable[[str], None] | None = None) -> Path:
    """The folder or GGUF file a name stands for, made or fetched if need be; `tell` hears of the starter model being made.

    Raises CheckpointError for an unknown name, and for a published one that this version does not read, before anything is fetched.
    """
    word = str(name_or_path).lower()
    for release in CHECKPOINTS.values():
        named = word in (name.lower() for name in _names_of(release)) and not Path(name_or_path).exists()
        if named and release.stored != "bf16":
            raise CheckpointError(f"{release.name} is stored as {release.stored}, which this version does not read; take the bf16 release")
    published = {name: repository for release in CHECKPOINTS.values() for name, repository in _names_of(release).items()}
    makers = {STARTER_NAME: lambda: starter_folder(environment, tell), SIGHTED_NAME: sighted_folder}
    return resolve(name_or_path, environment, published=published, makers=makers)


def _names_of(release: Release) -> dict[str, str]:
    """What people call a release -> its repository: each repository in full and without its owner, the release, and its short name."""
    first = release.hub_names[0]
    names = {release.name.removeprefix("ERNIE-4.5-"): first, release.name: first}
    for repository in release.hub_names:
        names |= {repository.partition("/")[2]: repository, repository: repository}
    return names


def open_model(path: Path, *, mtp: bool = True, text_only: bool = False, positions: PositionRule = "original") -> OpenModel:
    """Read the config, names and shapes of a model folder or GGUF file, and plan its loading. `.plan` says whether it can be loaded.

    `mtp`, `text_only` and `positions` as for `load_model`.
    """
    if path.suffix == ".gguf":
        return _open_gguf(path)
    data = read_config(path)
    spec = packed_spec(data, str(path / "config.json"))
    if spec is not None:
        return _open_packed(path, data, spec, mtp=mtp, text_only=text_only, positions=positions)
    foreign = data.get("quantization_config")
    described = _config_of(path, data, positions)
    config, vision = described.text, described.vision
    files = open_safetensors(path)
    if foreign:
        files = DecodedFiles(files, foreign, str(path))
    layout = detect_layout(files.names(), str(path))
    infos = {name: files.info(name) for name in files.names()}
    shapes = {name: info.shape for name, info in infos.items()}
    config, ignored, notes = _settle(config, data, shapes, layout.name, layout.prefix, mtp=mtp)
    wanted = ModelConfig(config, None if text_only else vision)
    if vision and text_only:
        ignored += without_sight(layout)
    table = name_table(config, layout, sighted=vision is not None, ignored=ignored)
    plan = table.load_plan(shapes, _wanted(wanted, len(shapes), path))
    unseen = _left_for_text(vision, sum(infos[name].nbytes for name in plan.ignored)) if vision and text_only else ""
    sizes: Counter[torch.dtype] = Counter()
    for info in infos.values():
        sizes[torch.bfloat16 if info.dtype == torch.uint16 else info.dtype] += math.prod(info.shape)
    if foreign:
        notes.append(f"quantised by {foreign['quant_method']}; read as floats")
    return OpenModel(
        path, config, layout.name, files, plan, sizes.most_common(1)[0][0], _noted(notes, unseen), vision=wanted.vision, unseen=unseen
    )


def _config_of(path: Path, data: Mapping[str, Any], positions: PositionRule) -> ModelConfig:
    config = ModelConfig.from_hf(_without_quantisation(data), str(path / "config.json"))
    return config if config.vision is None else replace(config, vision=replace(config.vision, position_rule=positions))


def _left_for_text(vision: VisionConfig, nbytes: int) -> str:
    return (
        f"vision tower ({vision.depth} blocks), resampler and vision experts were left in the files (text_only): "
        f"{nbytes / 2**20:,.1f} MiB as stored, which take no memory"
    )


def _noted(notes: list[str], unseen: str) -> tuple[str, ...]:
    return (*notes, unseen) if unseen else tuple(notes)


def _without_quantisation(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "quantization_config"}


def _open_packed(path: Path, data: Mapping[str, Any], spec: QuantSpec, *, mtp: bool, text_only: bool, positions: PositionRule) -> OpenModel:
    described = _config_of(path, data, positions)
    config, vision = described.text, described.vision
    if not mtp:
        config, spec = replace(config, num_mtp=0), without_rules_for_mtp(spec)
    files = open_safetensors(path)
    infos = {name: files.info(name) for name in files.names()}
    shapes = {name: info.shape for name, info in infos.items()}
    notes = [f"packed by {', '.join(dict.fromkeys(rule.scheme or 'whole' for rule in spec.rules))}"]
    if vision and text_only:
        spec = without_rules_for_sight(spec)
    wanted = _wanted(ModelConfig(config, None if text_only else vision), len(shapes), path, spec)
    plan = packed_table(wanted, mtp=mtp, text_only=text_only).load_plan(shapes, wanted)
    unseen = _left_for_text(vision, sum(infos[name].nbytes for name in plan.ignored)) if vision and text_only else ""
    stored = infos["norm.weight"].dtype if "norm.weight" in infos else torch.float32
    return OpenModel(path, config, "packed", files, plan, stored, _noted(notes, unseen), spec, None if text_only else vision, unseen)


def _open_gguf(path: Path) -> OpenModel:
    files = open_gguf(path)
    shapes = {name: files.info(name).shape for name in files.names()}
    config = config_from_gguf(files.metadata, shapes, str(path))
    plan = name_table(config, "gguf").load_plan(shapes, _wanted(ModelConfig(config), len(shapes), path))
    sizes: Counter[str] = Counter()
    for name, shape in shapes.items():
        sizes[files.type_of(name)] += math.prod(shape)
    most = sizes.most_common(1)[0][0]
    stored = {"F32": torch.float32, "F16": torch.float16}.get(most, torch.bfloat16)
    return OpenModel(path, config, "gguf", files, plan, stored, (f"most weights are stored as {most}",))


def _settle(
    config: TextConfig, data: Mapping[str, Any], shapes: Mapping[str, Shape], layout: str, prefix: str, *, mtp: bool
) -> tuple[TextConfig, list[Ignored], list[str]]:
    """Where config and files disagree about the head or the MTP block, the files decide and a note says so."""
    ignored: list[Ignored] = []
    notes: list[str] = []
    if config.tie_embeddings and head_name(layout) in shapes:
        if "tie_word_embeddings" in data:
            ignored.append(without_head(layout))
            notes.append(f"{head_name(layout)} repeats the embedding of a tied model and is not loaded")
        else:
            config = replace(config, tie_embeddings=False)
            notes.append(f"config.json does not say whether the head is tied; the files have {head_name(layout)}, so it is not")
    stored = has_mtp(shapes)
    if stored and not mtp:
        config = replace(config, num_mtp=0)
        ignored.append(without_mtp(prefix))
        notes.append("the multi-token prediction block was left in the file (mtp=False)")
    elif stored and not config.num_mtp:
        config = replace(config, num_mtp=1)
        notes.append(
            "the files have a multi-token prediction block that config.json does not mention; it is loaded (mtp=False leaves it out)"
        )
    elif config.num_mtp and not stored:
        config = replace(config, num_mtp=0)
        if mtp:
            notes.append("config.json announces a multi-token prediction block and the files have none; the model is built without it")
    return config, ignored, notes


def _wanted(described: ModelConfig, num_tensors: int, where: Path, spec: QuantSpec | None = None) -> dict[str, Shape]:
    """Name and shape of every parameter of the model, without memory for them.

    A hostile config must cost no time either: a layer needs tensors of its own, and no width is near `MAX_WIDTH`.
    """
    config, vision = described.text, described.vision
    e = config.experts
    widths = {"hidden_size": config.hidden_size, "feed-forward width": config.ffn_size, "query width": config.query_size}
    widths |= {"vocabulary": config.vocab_size}
    widths |= {"expert width": e.expert_size, "shared width": e.shared_size, "number of experts": e.num_experts * 256} if e else {}
    if vision:
        widths |= {
            "width of joined patches": vision.joined_size,
            "patch": vision.patch_values,
            "vision feed-forward width": vision.ffn_size,
        }
        widths |= {"vision expert width": vision.expert_size}
    for name, width in widths.items():
        if width > MAX_WIDTH:
            raise CheckpointError(f"{where}: the config's {name} is too large to be a model's; take the config published with the weights")
    layers = config.num_layers + (vision.depth if vision else 0)
    if layers > num_tensors:
        raise CheckpointError(f"{where}: the config has {layers:,} layers and the files have {num_tensors:,} tensors")
    return _shapes(_empty_decoder(described, spec, torch.float32))


def _empty_decoder(config: ModelConfig, spec: QuantSpec | None, dtype: torch.dtype) -> Decoder:
    """The network without memory for its weights, packed where `spec` says; packed embeddings answer in `dtype`."""
    with torch.device("meta"):
        decoder = Decoder(config.text, config.vision)
        if spec is not None:
            prepare_model(decoder.to(dtype), spec)
    return decoder


def _held(opened: OpenModel, needed: int, dtype_of: Callable[[str], torch.dtype], mapped: bool | None) -> Held:
    """How `needed` bytes of weights are held: in memory of their own, or in the mapped file what needs no change.

    mapped: as asked for; None decides. Memory of its own is read faster, so the weights stay in the file only where they would crowd out
    the rest, or where copying them would take long.
    """
    if mapped is None:
        mapped = needed > _ROOMY * available_memory() or (opened.spec is not None and needed > _LARGE_PACKED)
    files, stay = opened.files, 0
    for piece in opened.plan.pieces if mapped and isinstance(files, TensorFiles) else ():
        dtype = dtype_of(piece.ours)
        if piece.whole and not piece.turned and files.info(piece.file).dtype == dtype:
            stay += math.prod(end - begin for begin, end in piece.box) * dtype.itemsize
    return Held(needed, stay)


def _refuse_what_cannot_fit(opened: OpenModel, held: Held, float_bytes: int) -> None:
    """Before a byte is read: raise CheckpointError when what cannot stay in the mapped files is more than the memory that is free."""
    own, free = held.total - held.mapped, available_memory()
    if own > free:
        said = "; ".join(advice(opened.described, free, float_bytes=float_bytes))
        raise CheckpointError(f"{opened.path}: its weights take {gib(own)}, and {gib(free)} are free. {said}")


def _shapes(decoder: Decoder) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}


def _check_tied_head(opened: OpenModel) -> None:
    """A tied model whose file has another head was tied by mistake; loading it would drop a matrix that matters."""
    head = opened.files.read(head_name(opened.layout))
    piece = next(piece for piece in opened.plan.pieces if piece.ours == "embed.weight")
    embed = opened.files.read(piece.file)
    turned = head.mT if head.shape != embed.shape or (opened.layout == "paddle") else head
    if head.dtype != embed.dtype or turned.shape != embed.shape or not torch.equal(turned, embed):
        raise CheckpointError(
            f"{opened.path}: config.json ties the head to the embedding, but {head_name(opened.layout)} in the files differs from it; "
            "set tie_word_embeddings to false if the model has a head of its own, or remove that tensor"
        )
    opened.files.release(head_name(opened.layout))


def _advice(plan: LoadPlan) -> list[str]:
    """What known findings mean."""
    lines = []
    if any(name.endswith(("e_score_correction_bias", "exp_probs_b.bias")) for name in plan.missing):
        lines.append(
            "The selection bias decides which experts are chosen; without it the model runs and answers worse, so it is not left out."
        )
    if any(name.endswith(_QUANTISED_ENDINGS) for name in plan.unexpected):
        lines.append("Scales beside weights mean a quantised checkpoint, which this version does not read; take the bfloat16 one, or GGUF.")
    if plan.missing and plan.unexpected:
        lines.append("Names both missing and unexpected: is config.json the one that was published with these weights?")
    elif plan.missing:
        lines.append("Tensors are missing: is the download complete?")
    return lines


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder. Raises CheckpointError when it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder}: no config.json, so it is not a model folder; there is: {there}")
    if path.stat().st_size > MAX_CONFIG:
        raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes; a model's config has a few thousand")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return data
