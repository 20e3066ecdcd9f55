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
from ernie45.errors import ConfigError, ErnieError
from ernie45.models.counts import count_parameters
from ernie45.models.vision_config import ModelConfig
from ernie45.recipes.terminal import Progress, Style, clean, progress_bar, size_text

LARGEST = 5
# Sizes of the compute types that a model can be loaded in, in bytes a number.
COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}
_LAYOUTS = {"pt": "PT (PyTorch)", "fused": "PT with fused experts", "paddle": "Paddle", "gguf": "GGUF (llama.cpp)", "packed": "packed"}


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a model folder or GGUF file holds, and what would be missing, left over or of the wrong shape when it is loaded.

    With --image: draw how an image is cut into patches and tokens.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER|FILE")] = ""
    """A model folder, a .safetensors or .gguf file, or a name that `ernie chat` takes. With --image it may be left out."""
    image: str = ""
    """An image file: write a PNG of it as the model sees it, resized, with patches, tokens and positions."""
    out: str = ""
    """Where that PNG goes (default: beside the image, NAME.patches.png)."""
    experts: bool = False
    """With --image and a model: load the model, and draw which vision experts each token goes to."""
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
    vision: dict[str, Any] | None = None
    parameters: int | None = None
    files: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    tensor_bytes: int = 0
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    largest: list[TensorLine] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    fits: list[str] = field(default_factory=list)
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
            if str(error) not in self.problems:  # the same file may be asked twice
                self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename or self.path}: {error.strerror or error}")


def run(config: InspectConfig, environment: Environment) -> int:
    """Inspect and print; the exit code is 0 when the model would load and 1 when there are problems."""
    if config.image:
        return run_map(config, environment)
    if not config.path or config.out or config.experts:
        raise ConfigError("ernie inspect needs a model folder or file, or --image FILE; --out and --experts are for --image")
    with progress_bar(environment) as progress:
        path = find(config.path, environment, progress)
        found = inspect(path, check=config.check, progress=progress)
    if config.json:
        print(clean(json.dumps(asdict(found), ensure_ascii=False, indent=2)))
    else:
        print("\n".join(report(found, Style.of(sys.stdout, environment))))
    return 1 if found.problems else 0


def run_map(config: InspectConfig, environment: Environment) -> int:
    """Draw the patches of an image, by the rules of the model named beside it or of the released ones."""
    from ernie45.recipes.patch_map import see, write_map
    from ernie45.tokens.pictures import PixelRules, read_pixel_rules

    if config.check:
        raise ConfigError("--check looks at a model's numbers and --image at an image: give one of them")
    rules = PixelRules()
    if config.path:
        with progress_bar(environment) as progress:
            folder = find(config.path, environment, progress)
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no model folder; the rules for images are in the folder of a model that sees")
        rules = read_pixel_rules(folder)
    image = Path(config.image).expanduser()
    seen = see(image, rules)
    out = Path(config.out).expanduser() if config.out else image.with_suffix(".patches.png")
    if config.experts:
        with progress_bar(environment) as progress:
            write_map(seen, out, lambda drawn: _with_experts(drawn, seen, config.path, rules, progress))
    else:
        write_map(seen, out)
    if config.json:
        print(clean(json.dumps(seen.facts() | {"map": str(out)}, ensure_ascii=False, indent=2)))
    else:
        print("\n".join([*map(clean, seen.lines()), f"map        {clean(str(out))}"]))
    return 0


def _with_experts(drawn: Any, seen: Any, model: str, rules: Any, progress: Progress) -> Any:
    """The map, and below it the experts of each layer. Raises `ConfigError` for a model that does not see."""
    from ernie45.models.load import load_model
    from ernie45.recipes.expert_map import draw_experts, experts_of, stacked

    if not model:
        raise ConfigError("--experts needs a model: ernie inspect MODEL --image FILE --experts")
    decoder = load_model(model, progress=lambda name, done, total: progress("loading weights", done, total))
    chosen = experts_of(decoder, seen, rules)
    assert decoder.config.experts is not None
    return stacked(drawn, draw_experts(seen, chosen, decoder.config.experts.num_experts))


def find(name: str, environment: Environment, progress: Progress) -> Path:
    """The folder or file a name stands for: a path as it is, anything else as `ernie chat` finds it."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from ernie45.models.load import find_model

    return find_model(name, environment, lambda stage: progress(stage, 0, 0))


def inspect(path: Path, check: bool = False, progress: Progress = lambda stage, done, total: None) -> Inspection:
    """Look at a folder, a safetensors file or a GGUF file. Every problem is in the result, none is raised."""
    found = Inspection(str(path))
    with found.noting():
        found.files = {p.name: p.stat().st_size for p in (sorted(path.iterdir()) if path.is_dir() else [path]) if p.is_file()}
    if path.is_dir():
        _family(path, found)
    _look(path, found, check, progress)
    if path.is_dir():
        _words(path, found)
    elif path.suffix == ".gguf":
        _gguf_words(path, found)
    return found


def _look(path: Path, found: Inspection, check: bool, progress: Progress) -> None:
    """Everything about the weights: as a model when the files hang together, else as far as each can be read."""
    from ernie45.models.load import OpenModel, open_model

    opened: OpenModel | None = None
    if path.is_dir() or path.suffix == ".gguf":
        with found.noting():
            opened = open_model(path)
    sources = [opened.files] if opened else _readable(path, found)
    lines = [line for source in sources for line in _tensor_lines(source)]
    _count(found, lines)
    shapes = {line.name: line.shape for line in lines}
    if opened:
        described = ModelConfig(opened.config, opened.vision)
        _describe(found, described, _LAYOUTS[opened.layout])
        found.fits = _fits(described, opened.spec)
        found.notes += opened.notes
        if not opened.plan.complete:
            found.problems.append(opened.complaint().partition(": ")[2])
    elif path.is_dir() and shapes:
        _compare(path, found, shapes)
    for source in sources if check else ():
        _check_numbers(found, source, progress)
    found.checked = check


def _readable(path: Path, found: Inspection) -> list[Any]:
    """Each weight file that can be read on its own; the others become problems."""
    from ernie45.weights.gguf import open_gguf
    from ernie45.weights.safetensors import open_safetensors

    sources = []
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with found.noting():
            sources.append(open_gguf(file) if file.suffix == ".gguf" else open_safetensors(file))
    return sources


def _tensor_lines(source: Any) -> Iterator[TensorLine]:
    for name in source.names():
        info = source.info(name)
        if hasattr(info, "nbytes"):
            yield TensorLine(name, str(info.dtype).removeprefix("torch."), tuple(info.shape), info.nbytes, info.file.name)
        else:
            yield TensorLine(name, info.type.name, tuple(info.shape), info.size, info.file.name)


def _compare(folder: Path, found: Inspection, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """For a damaged folder: what the readable files would give, so that one knows what to fetch again."""
    import torch

    from ernie45.models.load import read_config
    from ernie45.models.names import detect_layout, name_table
    from ernie45.models.text import Decoder

    with found.noting():
        config = ModelConfig.from_hf(read_config(folder), str(folder / "config.json"))
        layout = detect_layout([*shapes, *_listed(folder)], str(folder))
        _describe(found, config, _LAYOUTS[layout.name])
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in Decoder(config.text, config.vision).state_dict().items()}
        plan = name_table(config.text, layout, sighted=config.vision is not None).load_plan(shapes, wanted)
        if not plan.complete:
            found.problems.append("the readable files do not make the model:\n" + plan.explain())


def _listed(folder: Path) -> list[str]:
    """Tensor names of the index, which a damaged shard cannot take away; none when it cannot be read (then that is a problem already)."""
    try:
        return [str(name) for name in json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []


def _describe(found: Inspection, config: ModelConfig, layout: str) -> None:
    count = count_parameters(config.text, config.vision)
    found.layout, found.model = layout, asdict(config.text)
    found.vision = asdict(config.vision) if config.vision else None
    found.parameters = count.total + count.mtp
    found.memory = {kind: found.parameters * size for kind, size in COMPUTE_BYTES.items()}


def _fits(config: ModelConfig, spec: Any) -> list[str]:
    """What this machine's free memory is enough for, with numbers; counted from sizes, so no weight is read."""
    from ernie45.machine import available_memory
    from ernie45.models.memory import Held, advice, gib, plan_memory, usual_use
    from ernie45.models.sizes import weight_bytes

    free = available_memory()
    if spec is None:
        return advice(config, free)
    plan = plan_memory(config, Held(weight_bytes(config, spec, float_bytes=4)), usual_use(config, value_bytes=4, packed=True))
    verdict = "fits" if plan.least <= free else "does not fit"
    return [f"as it is packed it {verdict} into {gib(free)}: {gib(plan.least)}: {plan.text()}"]


def _count(found: Inspection, lines: list[TensorLine]) -> None:
    found.tensors, found.tensor_bytes = len(lines), sum(line.bytes for line in lines)
    counts, sizes = Counter(line.stored for line in lines), Counter()
    for line in lines:
        sizes[line.stored] += line.bytes
    found.numbers = {kind: {"tensors": counts[kind], "bytes": size} for kind, size in sizes.most_common()}
    found.largest = sorted(lines, key=lambda line: (-line.bytes, line.name))[:LARGEST]


def _words(folder: Path, found: Inspection) -> None:
    """Tokenizer and template of a folder: where they come from, or what is wrong with them. Neither is needed to load the weights."""
    from ernie45.tokens.template import load_template
    from ernie45.tokens.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except ErnieError as error:
        found.notes.append(f"text prompts will not work: {error}")
        return
    files = [name for name in ("tokenizer.json", "tokenizer.model") if name in found.files]
    found.tokenizer = f"{' and '.join(files)}, {tokenizer.vocab_size:,} words"
    try:
        template = load_template(folder, tokenizer)
    except ErnieError as error:
        found.notes.append(f"chat will not work: {error}")
        return
    found.template = "the folder's own (Jinja)" if template.source == "folder" else f"known: {template.source}"


def _family(path: Path, found: Inspection) -> None:
    """What the folder calls itself, whether or not it can be loaded."""
    with found.noting():
        try:
            data = json.loads((path / "config.json").read_text(encoding="utf-8"))
            found.family = str(data["model_type"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            return  # `open_model` reads it too and has the words for what is wrong
        if data.get("ernie45_source"):
            found.notes.append(str(data["ernie45_source"]))


def _gguf_words(path: Path, found: Inspection) -> None:
    """The same for a GGUF file, whose metadata holds the tokenizer."""
    from ernie45.weights.gguf import open_gguf

    try:
        with open_gguf(path) as file:
            data = file.metadata
    except ErnieError:
        return  # noted already
    found.family = str(data.get("general.architecture", "unknown"))
    words = data.get("tokenizer.ggml.tokens")
    if isinstance(words, list):
        found.tokenizer = f"in the file: {data.get('tokenizer.ggml.model', 'unnamed')}, {len(words):,} words"
    if "tokenizer.chat_template" in data:
        found.template = "in the file (Jinja)"


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


def report(found: Inspection, style: Style) -> list[str]:
    """The findings as lines for people."""
    rows: list[tuple[str, str]] = [("family", found.family), ("layout", found.layout)]
    if found.model:
        rows.append(("model", _model_text(found.model)))
    if found.vision:
        rows.append(("vision", _vision_text(found.vision)))
    if found.parameters:
        rows.append(("parameters", f"{found.parameters:,}"))
    rows.append(("tensors", f"{found.tensors:,} in {_plural(_weight_files(found), 'file')}, {size_text(found.tensor_bytes)}"))
    rows += [("", f"{kind}: {_plural(v['tensors'], 'tensor')}, {size_text(v['bytes'])}") for kind, v in found.numbers.items()]
    for i, line in enumerate(found.largest):
        rows.append(("largest" if i == 0 else "", f"{line.name} {list(line.shape)} {line.stored}, {size_text(line.bytes)}"))
    if found.memory:
        rows.append(("to load", ", ".join(f"{size_text(size)} in {kind}" for kind, size in found.memory.items())))
    rows += [("free memory" if i == 0 else "", line) for i, line in enumerate(found.fits)]
    rows += [("tokenizer", found.tokenizer), ("template", found.template)]
    width = max(len(name) for name, _ in rows)
    lines = [style.bold(clean(found.path)), *(f"  {style.dim(f'{name:<{width}}')}  {clean(text)}" for name, text in rows)]
    lines += [f"  {style.dim('note'.ljust(width))}  {clean(note)}" for note in found.notes]
    if not found.problems:
        numbers = "and every number is finite" if found.checked else "--check looks at the numbers too"
        verdict = f"The files make the model; {numbers}."
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
        chosen = f"{experts['top_k']} per token, {experts['num_shared']} shared"
        text += f", {experts['num_experts']} experts of width {experts['expert_size']:,} ({chosen})"
    if model.get("num_mtp"):
        text += ", multi-token prediction"
    return text + (", tied head" if model["tie_embeddings"] else ", separate head")


def _vision_text(vision: Mapping[str, Any]) -> str:
    return (
        f"{vision['depth']} blocks of width {vision['size']:,}, {vision['num_heads']} heads, feed-forward {vision['ffn_size']:,}, patches "
        f"of {vision['patch_size']} pixels, {vision['merge']} x {vision['merge']} to a token, experts of width {vision['expert_size']:,}"
    )


def _weight_files(found: Inspection) -> int:
    return sum(name.endswith((".safetensors", ".gguf")) for name in found.files)


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"
