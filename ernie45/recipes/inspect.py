"""What is in a model folder or GGUF file, and what would go wrong when it is loaded. Headers only: no weight is read without `--check`.

A damaged folder is what one inspects, so nothing here ends at the first problem: each is noted, and the look goes on.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ernie45.config import Environment
from ernie45.errors import ErnieError
from ernie45.recipes.terminal import Progress, Style, clean, progress_bar, size_text

LARGEST = 5
# Sizes of the compute types that a model can be loaded in, in bytes a number.
COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a model folder or GGUF file holds, and what would be missing, left over or of the wrong shape when it is loaded."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER|FILE")]
    """A model folder, a .safetensors or .gguf file, or a name that `ernie chat` takes."""
    check: bool = False
    """Read every weight and look for NaN and infinity."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class TensorLine:
    """One tensor as its file describes it; `stored` is the number format's name there, `bytes` its size in the file."""

    name: str
    stored: str
    shape: tuple[int, ...]
    bytes: int
    file: str


@dataclass
class Inspection:
    """The findings. `problems` is empty when the model would load; `notes` are worth knowing and stop nothing."""

    path: str
    family: str = "unknown"
    layout: str = "unknown"
    model: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    files: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    tensor_bytes: int = 0
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    largest: list[TensorLine] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    tokenizer: str = "none"
    template: str = "none"
    checked: bool = False
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A mistake in the files becomes a problem in the list, and the look goes on behind the block."""
        try:
            yield
        except ErnieError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename or self.path}: {error.strerror or error}")


def run(config: InspectConfig, environment: Environment) -> int:
    """Inspect and print; the exit code is 0 when the model would load and 1 when there are problems."""
    path = find(config.path, environment)
    with progress_bar(environment) as progress:
        found = inspect(path, check=config.check, progress=progress)
    if config.json:
        print(clean(json.dumps(asdict(found), ensure_ascii=False, indent=2)))
    else:
        print("\n".join(report(found, Style.of(sys.stdout, environment))))
    return 1 if found.problems else 0


def find(name: str, environment: Environment) -> Path:
    """The folder or file a name stands for: a path as it is, anything else as `ernie chat` finds it."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from ernie45.models.load import find_model

    return find_model(name, environment)


def inspect(path: Path, check: bool = False, progress: Progress = lambda stage, done, total: None) -> Inspection:
    """Look at a folder, a safetensors file or a GGUF file. Every problem is in the result, none is raised."""
    found = Inspection(str(path))
    with found.noting():
        found.files = {p.name: p.stat().st_size for p in (sorted(path.iterdir()) if path.is_dir() else [path]) if p.is_file()}
    if path.suffix == ".gguf":
        _inspect_gguf(path, found, check, progress)
    else:
        _inspect_folder(path, found, check, progress)
    return found


def _inspect_gguf(path: Path, found: Inspection, check: bool, progress: Progress) -> None:
    from ernie45.models.gguf_config import config_from_gguf
    from ernie45.weights.gguf import open_gguf

    found.layout = "GGUF (llama.cpp)"
    with found.noting(), open_gguf(path) as file:
        infos = [file.info(name) for name in file.names()]
        _count(found, [TensorLine(i.name, i.type.name, tuple(i.shape), i.size, path.name) for i in infos])
        found.family = str(file.metadata.get("general.architecture", "unknown"))
        with found.noting():
            if "tokenizer.ggml.model" in file.metadata:
                words = file.metadata.get("tokenizer.ggml.tokens") or []
                found.tokenizer = f"in the file: {file.metadata['tokenizer.ggml.model']}, {len(words):,} words"
            if "tokenizer.chat_template" in file.metadata:
                found.template = "in the file (Jinja)"
        with found.noting():
            config = config_from_gguf(file.metadata, {i.name: tuple(i.shape) for i in infos}, path.name)
            _plan(found, config, {i.name: tuple(i.shape) for i in infos}, "gguf", None)
        if check:
            _check_numbers(found, file, progress)


def _inspect_folder(path: Path, found: Inspection, check: bool, progress: Progress) -> None:
    from ernie45.models.names import detect_layout

    folder = path if path.is_dir() else path.parent
    config = _read_config(folder / "config.json", found)
    shapes: dict[str, tuple[int, ...]] = {}
    sources = _open_tensors(path, found)
    lines = []
    for source in sources:
        for name in source.names():
            info = source.info(name)
            lines.append(TensorLine(name, str(info.dtype).removeprefix("torch."), tuple(info.shape), info.nbytes, info.file.name))
            shapes[name] = tuple(info.shape)
    _count(found, lines)
    _words(folder, found)
    if shapes:
        with found.noting():
            layout, prefix = detect_layout(shapes, path.name)
            found.layout = {"pt": "PT (PyTorch)", "fused": "PT, experts fused", "paddle": "Paddle"}.get(layout, layout)
            if config is not None:
                _plan(found, config, shapes, layout, prefix)
    if check:
        for source in sources:
            _check_numbers(found, source, progress)


def _read_config(path: Path, found: Inspection) -> Any:
    from ernie45.models.config import TextConfig

    with found.noting():
        if not path.is_file():
            found.problems.append(f"{path.name} is missing; without it the sizes of the model are not known")
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            found.problems.append(f"{path.name} is not JSON: {error}")
            return None
        if not isinstance(data, dict):
            found.problems.append(f"{path.name} is no table of settings")
            return None
        found.family = str(data.get("model_type", "unknown"))
        if data.get("ernie45_source"):
            found.notes.append(f"made from: {data['ernie45_source']}")
        return TextConfig.from_hf(data, path.name)
    return None


def _open_tensors(path: Path, found: Inspection) -> list[Any]:
    """The weights as one source; when they do not hang together, each file that can be read on its own."""
    from ernie45.weights.safetensors import open_safetensors

    try:
        return [open_safetensors(path)]
    except ErnieError as error:
        found.problems.append(str(error))
    sources = []
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else []:
        try:
            sources.append(open_safetensors(file))
        except ErnieError as error:
            if str(error) not in found.problems:
                found.problems.append(str(error))
    return sources


def _count(found: Inspection, lines: list[TensorLine]) -> None:
    found.tensors, found.tensor_bytes = len(lines), sum(line.bytes for line in lines)
    counts, sizes = Counter(line.stored for line in lines), Counter()
    for line in lines:
        sizes[line.stored] += line.bytes
    found.numbers = {kind: {"tensors": counts[kind], "bytes": size} for kind, size in sizes.most_common()}
    found.largest = sorted(lines, key=lambda line: (-line.bytes, line.name))[:LARGEST]


def _words(folder: Path, found: Inspection) -> None:
    """Tokenizer and template of a folder: where they come from, or what is wrong with them."""
    from ernie45.tokens.template import load_template
    from ernie45.tokens.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except ErnieError as error:
        found.notes.append(f"no chat and no text prompts: {error}")
        return
    files = [name for name in ("tokenizer.json", "tokenizer.model") if name in found.files]
    found.tokenizer = f"{' and '.join(files) or 'found'}, {tokenizer.vocab_size:,} words"
    try:
        template = load_template(folder, tokenizer)
    except ErnieError as error:
        found.notes.append(f"no chat: {error}")
        return
    found.template = template_source(template)


def template_source(template: Any) -> str:
    """Where a chat template comes from, in words."""
    return str(getattr(template, "source", "") or getattr(template, "family", "") or "found")


def _plan(found: Inspection, config: Any, shapes: Mapping[str, tuple[int, ...]], layout: str, prefix: str | None) -> None:
    """Compare what the model needs with what the files have."""
    from ernie45.models.load import plan_load

    found.model = {name: value for name, value in asdict(config).items() if value is not None}
    plan, wanted = plan_load(config, shapes, layout, prefix)
    found.parameters = sum(_elements(shape) for shape in wanted.values())
    found.memory = {kind: found.parameters * size for kind, size in COMPUTE_BYTES.items()}
    if not plan.complete:
        found.problems.append(plan.explain())
    found.notes += sorted({f"left in the file: {reason}" for reason in plan.ignored.values()})


def _elements(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _check_numbers(found: Inspection, source: Any, progress: Progress) -> None:
    from ernie45.weights.stream import check_finite

    names = source.names()
    for done, name in enumerate(names):
        progress("checking", done, len(names))
        with found.noting():
            tensor = source.read(name)
            if tensor.is_floating_point():
                check_finite(name, tensor)
            source.release(name)
    found.checked = True


def report(found: Inspection, style: Style) -> list[str]:
    """The findings as lines for people."""
    rows: list[tuple[str, str]] = [("family", found.family), ("layout", found.layout)]
    if found.model:
        rows.append(("model", _model_text(found.model)))
    if found.parameters:
        rows.append(("parameters", f"{found.parameters:,}"))
    rows.append(("tensors", f"{found.tensors:,} in {_plural(_weight_files(found), 'file')}, {size_text(found.tensor_bytes)}"))
    rows += [("", f"{kind}: {_plural(v['tensors'], 'tensor')}, {size_text(v['bytes'])}") for kind, v in found.numbers.items()]
    for i, line in enumerate(found.largest):
        rows.append(("largest" if i == 0 else "", f"{line.name} {list(line.shape)} {line.stored}, {size_text(line.bytes)}"))
    if found.memory:
        rows.append(("to load", ", ".join(f"{size_text(size)} in {kind}" for kind, size in found.memory.items())))
    rows += [("tokenizer", found.tokenizer), ("template", found.template)]
    width = max(len(name) for name, _ in rows)
    lines = [style.bold(clean(found.path)), *(f"  {style.dim(f'{name:<{width}}')}  {clean(text)}" for name, text in rows)]
    for note in found.notes:
        lines.append(f"  {style.dim(f'{"note":<{width}}')}  {clean(note)}")
    if not found.problems:
        verdict = "Everything is there, and every number is finite." if found.checked else "Everything is there. --check looks at the numbers too."
        return [*lines, "", verdict]
    lines += ["", style.warning(f"{_plural(len(found.problems), 'problem')}:")]
    for problem in found.problems:
        first, *rest = clean(problem).split("\n")
        lines += [f"  - {first}", *(f"    {line}" for line in rest)]
    return lines


def _model_text(model: Mapping[str, Any]) -> str:
    experts = model.get("experts")
    text = (
        f"{model['num_layers']} layers of width {model['hidden_size']:,}, {model['num_heads']} heads over {model['num_kv_heads']} of size "
        f"{model['head_size']}, feed-forward {model['ffn_size']:,}, vocabulary {model['vocab_size']:,}, context {model['max_positions']:,}"
    )
    if experts:
        text += f", {experts['num_experts']} experts of width {experts['expert_size']:,} ({experts['top_k']} per token, {experts['num_shared']} shared)"
    if model.get("num_mtp"):
        text += ", multi-token prediction"
    return text + (", tied head" if model["tie_embeddings"] else ", separate head")


def _weight_files(found: Inspection) -> int:
    return sum(name.endswith((".safetensors", ".gguf")) for name in found.files)


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"
