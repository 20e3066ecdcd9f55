"""`ernie quantize MODEL --scheme w4a8 --out DIR`: a model with fewer bits, and what that cost, measured.

ernie quantize starter --out small                        4 bits by GPTQ, head and embedding 8 bits
ernie quantize MODEL --method awq+gptq --group 32 --out DIR
ernie quantize MODEL --rule 'layers.0.*=w8a8' --out DIR   the first layer keeps 8 bits
"""

import fnmatch
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ernie45.config import Environment
from ernie45.errors import CheckpointError, ConfigError
from ernie45.quant.spec import Fp8Scheme, QuantSpec, Rule, Scheme, parse_scheme
from ernie45.recipes.terminal import progress_bar

_NONE = tyro.conf.arg(help_behavior_hint="")
REPORT, PICTURE = "quantisation.json", "quantisation.svg"


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantise a model layer by layer, measure the loss on held-out text, and write a folder that `ernie chat` runs."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder, GGUF file, Hub name, or `starter`."""
    out: Path
    """The folder to write; it must not exist yet."""
    scheme: str = "w4a8"
    """Bits of weights and activations: w4a8, w8a8, w4a16 or w8a16 (activations stay floats); FP8 numbers: fp8-block, fp8-channel or
    fp8-tensor, also -static; or a code: tcq2.06, ccq2.06, ccq2.5."""
    group: int = 64
    """Inputs that share a scale: 32, 64, 128, or 0 for a whole row."""
    method: Literal["rtn", "gptq", "awq", "awq+gptq", "smooth"] = "gptq"
    """rtn rounds to nearest and needs no text; gptq spreads rounding errors; awq widens important inputs first, smooth (SmoothQuant) large
    ones."""
    hadamard: bool = True
    """Turn the inputs of every matrix by a Hadamard matrix, so that a few large ones do not set the scale of their group."""
    head: Annotated[str | None, _NONE] = None
    """Scheme of the output head and an embedding tied to it (default: 8 bits, activations as in --scheme); `whole` keeps it in floats."""
    vision: Annotated[str | None, _NONE] = None
    """Scheme of the vision tower and resampler of a model that has them (default: as --head); `whole` keeps them in floats."""
    rule: tuple[str, ...] = ()
    """Exceptions, tried first: PATTERN=SCHEME, such as 'layers.0.*=w8a8' or '*.shared.*=whole'."""
    calibration: Annotated[Path | None, _NONE] = None
    """Text to calibrate with (default: three quarters of Python's help topics)."""
    pictures: Annotated[Path | None, _NONE] = None
    """Of a model that sees: a folder of images, or JSON lines of `messages` with images, to calibrate with (default: what sees is rounded
    to nearest)."""
    held_out: Annotated[Path | None, _NONE] = None
    """Text to measure on, which must not be in the calibration text (default: the other quarter)."""
    calibration_tokens: int = 16384
    """Tokens to calibrate with."""
    held_out_tokens: int = 8192
    """Tokens to measure on."""
    window: int = 512
    """Tokens of one sequence of either text."""
    least_expert_tokens: int = 128
    """An expert that sees fewer of the calibration tokens is calibrated on all of them."""
    all_experts: bool = False
    """Calibrate every expert on all tokens, whatever the router says."""
    target_bits: Annotated[float | None, _NONE] = None
    """Bits a weight in the layers, such as 5.5: 8 bits go where the scheme's 4 were measured to hurt most."""
    target_size: Annotated[str | None, _NONE] = None
    """The same as bytes of all weights, such as 11GiB or 90MB."""
    limit: float = 1.1
    """Stop, and write nothing, when perplexity grows by more than this factor."""
    report: Annotated[Path | None, _NONE] = None
    """Write the report here too, as JSON; also when the limit stops the run."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ConfigError(f"--limit is {self.limit}; it is a factor such as 1.03")
        for name in ("calibration_tokens", "held_out_tokens", "window", "least_expert_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.target_bits is not None and self.target_size is not None:
            raise ConfigError("--target-bits and --target-size ask for the same thing; give one of them")
        if (self.target_bits or self.target_size) and self.method == "rtn":
            raise ConfigError("--target-bits and --target-size measure on the calibration text; take another --method than rtn")
        if self.target_size is not None:
            bytes_of(self.target_size)
        if self.pictures is not None and self.method == "rtn":
            raise ConfigError("--pictures are calibrated with, and --method rtn looks at nothing; take another --method")
        if self.window < 2:
            raise ConfigError("--window must be at least 2: a token is judged by the one after it")


def spec_of(config: QuantizeConfig, tied: bool, sighted: bool = False) -> QuantSpec:
    """The table from module names to schemes that the flags ask for. Raises `ConfigError` for words that are no scheme.

    Of a model that sees, the patch embedding stays whole: it is few of the weights, and everything passes it.
    """
    rules = [_rule(text) for text in config.rule]
    scheme = parse_scheme(config.scheme)
    eight = "whole" if isinstance(scheme, Fp8Scheme) else f"w8a{scheme.act_bits}"
    if sighted:
        rules.append(Rule(pattern="sight.tower.patches", scheme=None))
        rules.append(Rule(pattern="sight.*", scheme=_completed(config.vision or eight, config)))
    head = _completed(config.head or eight, config)
    rules.append(Rule(pattern="embed" if tied else "head", scheme=head))
    rules.append(Rule(pattern="*", scheme=_completed(config.scheme, config)))
    _refuse_codes(config, rules)
    return QuantSpec(rules=tuple(rules))


def _refuse_codes(config: QuantizeConfig, rules: Sequence[Rule]) -> None:
    """What codes of two bits do not go together with."""
    codes = [rule.scheme for rule in rules if rule.scheme is not None and _is_code(rule.scheme)]
    if codes and config.method not in ("rtn", "gptq"):
        raise ConfigError(
            f"--method {config.method} widens inputs for a grid of whole numbers, which '{codes[0]}' has not; take gptq or rtn"
        )
    if codes and codes[-1] == rules[-1].scheme and (config.target_bits or config.target_size):
        raise ConfigError(f"--target-bits and --target-size choose between 4 and 8 bits; with --scheme {config.scheme} take --rule")


def _is_code(word: str) -> bool:
    scheme = parse_scheme(word)
    return isinstance(scheme, Scheme) and bool(scheme.code)


def _completed(word: str, config: QuantizeConfig) -> str | None:
    """A scheme's word with the group and the turn of the flags, where it does not name its own; a code has its own groups, FP8 neither.

    None for `whole`.
    """
    if word == "whole" or word.startswith("fp8"):
        return None if word == "whole" else str(parse_scheme(word))
    if "-g" not in word and config.group and not Scheme.parse(word).code:
        word = word.removesuffix("-h") + f"-g{config.group}" + ("-h" if word.endswith("-h") else "")
    if config.hadamard and not word.endswith("-h"):
        word += "-h"
    return str(Scheme.parse(word))


def bytes_of(text: str) -> int:
    """`11GiB`, `90MB`, `5000000` as a number. Raises `ConfigError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?", text.strip())
    if not found:
        raise ConfigError(f"--target-size is '{text}'; write a size such as 11GiB or 90MB")
    base = 1024 if (found[2] or "").endswith("i") else 1000
    return int(float(found[1]) * base ** (" KMGT".index(found[2][0].upper()) if found[2] else 0))


def _allocated(config: QuantizeConfig, spec: QuantSpec, source: Any, plan: Any, told: Any) -> QuantSpec:
    """`spec` with the matrices of its last rule at 4 or 8 bits, as the budget allows and their measured needs ask."""
    from ernie45.quant.allocate import allocate, spec_from
    from ernie45.quant.convert import decided
    from ernie45.quant.survey import survey

    ends = source.skeleton_ends()
    schemes = decided(source, ends, spec)
    fixed = spec.rules[:-1]
    scheme = parse_scheme(str(spec.rules[-1].scheme))
    if isinstance(scheme, Fp8Scheme):
        raise ConfigError("--target-bits and --target-size choose between 4 and 8 bits; FP8 numbers have 8 throughout")
    words = tuple(str(replace(scheme, weight_bits=bits)) for bits in (4, 8))
    needs = survey(source, plan.calibration_SL, words, plan.least_expert_tokens, told)
    free = [need for need in needs if not any(fnmatch.fnmatchcase(need.name, rule.pattern) for rule in fixed)]
    elements = sum(need.elements for need in free)
    if config.target_size is None:
        return spec_from(allocate(free, (config.target_bits or 0) * elements), spec)
    sizes = source.matrix_sizes()
    names = {need.name for need in free}
    others = sum(
        count * (scheme.bits_per_weight(width) if (scheme := schemes.get(name)) else 32)
        for name, (count, width) in sizes.items()
        if name not in names
    )
    return spec_from(allocate(free, bytes_of(config.target_size) * 8 - others), spec)


def _rule(text: str) -> Rule:
    pattern, equals, word = text.rpartition("=")
    if not equals or not pattern:
        raise ConfigError(f"--rule '{text}' is no PATTERN=SCHEME; write 'layers.0.*=w8a8' or '*.down=whole'")
    return Rule(pattern=pattern, scheme=None if word == "whole" else str(parse_scheme(word)))


def run(config: QuantizeConfig, environment: Environment) -> int:
    """Quantise, print the report, and return 0; or 1 when the limit was passed and nothing was written."""
    report = quantize(config, environment)
    print(table(report))
    if config.report:
        config.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not report["within_limit"]:
        print(
            f"ernie: perplexity {report['quality']['perplexity_before']:.4f} became {report['quality']['perplexity_after']:.4f}, "
            f"{report['ratio']:.4f} times, and the limit is {config.limit}; {config.out} was not written. "
            "Take a smaller group, awq+gptq, or keep the worst matrices at 8 bits with --rule.",
            file=sys.stderr,
        )
        return 1
    print(f"{config.out}: {report['bytes']:,} bytes of weights; try: ernie chat {config.out}")
    return 0


def quantize(config: QuantizeConfig, environment: Environment) -> dict[str, Any]:
    """Do the work and return the report as plain data. The folder is there afterwards if and only if `report["within_limit"]`.

    Raises `ErnieError` subclasses for anything wrong with model, text, settings or disk; no half-written folder is left behind.
    """
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise CheckpointError(f"{config.out} exists and is not an empty folder; choose another name, or remove it first")
    with progress_bar(environment) as progress:
        progress("starting", 0, 0)
        from ernie45.models.by_layer import LayeredModel
        from ernie45.models.load import find_model, open_model
        from ernie45.quant.convert import convert

        path = find_model(config.model, environment, lambda line: progress(line, 0, 0))
        opened = open_model(path)
        if opened.spec is not None:
            raise CheckpointError(f"{path} is quantised already; quantise the original instead")
        source = LayeredModel(opened)
        try:
            spec = spec_of(config, opened.config.tie_embeddings, opened.vision is not None)
            texts = _texts(config, opened)
            plan = _plan(config, spec, texts, opened)
            if config.target_bits is not None or config.target_size is not None:
                spec = _allocated(config, spec, source, plan, progress)
                plan = replace(plan, spec=spec, fingerprint=_fingerprint(config, spec, texts, path))
            work = config.out.parent / f".{config.out.name}.quantising"
            converted = convert(source, plan, work, progress)
            report = _report(config, spec, texts, converted, path)
            if report["within_limit"]:
                _finish(config, spec, source, converted, path, report)
            else:
                shutil.rmtree(work)
        finally:
            source.close()
    return report


def _texts(config: QuantizeConfig, opened: Any) -> dict[str, Any]:
    """Origin and windows of both texts."""
    from ernie45.recipes.texts import built_in_text, read_text, spread_windows
    from ernie45.tokens.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as made:
        tokenizer = load_tokenizer(_text_side(opened, Path(made)))
    result: dict[str, Any] = {}
    for kind, file, tokens in (
        ("calibration", config.calibration, config.calibration_tokens),
        ("held-out", config.held_out, config.held_out_tokens),
    ):
        if kind == "calibration" and config.method == "rtn":
            result[kind] = ("none", [])
            continue
        reading = read_text(file) if file else built_in_text(held_out=kind == "held-out")
        result[kind] = (reading.origin, spread_windows(tokenizer, reading, tokens, config.window, kind))
    if config.pictures is not None:
        from ernie45.recipes.scenes import read_scenes

        result["pictures"] = read_scenes(config.pictures, opened, tokenizer, config.window, result["calibration"][1])
    return result


def _text_side(opened: Any, made: Path) -> Path:
    """The folder with the tokenizer's files: the model's own, or `made`, filled from a GGUF file's metadata."""
    if opened.path.is_dir():
        return opened.path
    from ernie45.tokens.gguf_vocabulary import tokenizer_from_gguf

    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), tokenizer_from_gguf(opened.files.metadata), strict=True):
        (made / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return made


def _plan(config: QuantizeConfig, spec: QuantSpec, texts: dict[str, Any], opened: Any) -> Any:
    import torch

    from ernie45.quant.convert import Plan
    from ernie45.quant.methods import method_named

    calibration, held_out = (torch.tensor(texts[kind][1], dtype=torch.int64) for kind in ("calibration", "held-out"))
    return Plan(
        spec=spec,
        method=method_named(config.method),
        calibration_SL=calibration.view(-1, config.window),
        held_out_SL=held_out,
        least_expert_tokens=_least(config),
        fingerprint=_fingerprint(config, spec, texts, opened.path),
        scenes=tuple(texts.get("pictures", ())),
    )


def _least(config: QuantizeConfig) -> int:
    return sys.maxsize if config.all_experts else config.least_expert_tokens


def _fingerprint(config: QuantizeConfig, spec: QuantSpec, texts: dict[str, Any], path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    shown = [
        hashlib.sha256(scene.patches_SC.numpy().tobytes() + repr(scene.tokens_L.tolist()).encode()).hexdigest()
        for scene in texts.get("pictures", ())
    ]
    told = [
        str(path.resolve()), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files], spec.to_dict(), config.method,
        texts["calibration"][1], texts["held-out"][1], _least(config), *shown,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _report(config: QuantizeConfig, spec: QuantSpec, texts: dict[str, Any], converted: Any, path: Path) -> dict[str, Any]:
    from ernie45.quant.measure import worst

    quality = converted.quality
    before = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size
    return {
        "model": path.name if path.is_dir() else path.stem,
        "method": config.method,
        "spec": spec.to_dict(),
        "quality": {**asdict(quality), "tokens": quality.tokens},
        "ratio": quality.ratio,
        "limit": config.limit,
        "within_limit": bool(math.isfinite(quality.ratio) and quality.ratio <= config.limit),
        "bytes": converted.nbytes,
        "bytes_before": before,
        "calibration": {
            "text": texts["calibration"][0],
            "tokens": sum(map(len, texts["calibration"][1])),
            "pictures": sum(len(scene.grids) for scene in texts.get("pictures", ())),
        },
        "held_out": {"text": texts["held-out"][0], "tokens": sum(map(len, texts["held-out"][1])), "window": config.window},
        "resumed_at_layer": converted.resumed_at,
        "worst": [asdict(matrix) for matrix in worst(converted.layers)],
        "layers": [asdict(layer) for layer in converted.layers],
        "sight": [asdict(matrix) for matrix in converted.sight],
    }


def _finish(config: QuantizeConfig, spec: QuantSpec, source: Any, converted: Any, path: Path, report: dict[str, Any]) -> None:
    """Everything a model folder has beside weights, then the folder in its place."""
    from ernie45.models.packed import packed_entry
    from ernie45.models.save import copy_companions
    from ernie45.models.vision_config import ModelConfig
    from ernie45.quant.convert import leave_only_model
    from ernie45.quant.measure import picture

    work = converted.work
    try:
        body = ModelConfig(source.config, source.opened.vision).to_hf() | {
            "torch_dtype": "float32",
            "quantization_config": packed_entry(spec, config.method),
        }
        if path.is_dir():
            original = json.loads((path / "config.json").read_text(encoding="utf-8"))
            body |= {key: original[key] for key in ("ernie45_source",) if key in original}
            copy_companions(path, work)
        else:
            _text_side(source.opened, work)
        (work / "config.json").write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        (work / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        title = f"{report['model']}: {config.method}, {config.scheme}, perplexity x {report['ratio']:.4f}"
        (work / PICTURE).write_text(picture(converted.layers, title), encoding="utf-8")
        leave_only_model(work)
        if config.out.exists():
            config.out.rmdir()
        work.rename(config.out)
    except OSError as error:
        raise CheckpointError(f"{config.out} cannot be written: {error.strerror or error}; the work is kept in {work}") from error


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    quality = report["quality"]
    rows = [
        ("perplexity before", f"{quality['perplexity_before']:.4f}"),
        ("perplexity after", f"{quality['perplexity_after']:.4f}"),
        ("ratio", f"{report['ratio']:.4f}  (limit {report['limit']}; +- {quality['nll_spread']:.4f})"),
        ("divergence (KL, nats per token)", f"{quality['divergence']:.5f}"),
        ("same first choice", f"{quality['agreement']:.2%}"),
        ("size", f"{report['bytes']:,} bytes, before {report['bytes_before']:,} ({report['bytes'] / report['bytes_before']:.1%})"),
        ("held-out text", f"{report['held_out']['text']}, {report['held_out']['tokens']:,} tokens"),
        ("calibration", f"{report['calibration']['text']}, {report['calibration']['tokens']:,} tokens"),
    ]
    if report["calibration"]["pictures"]:
        rows.append(("pictures", f"{report['calibration']['pictures']}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines.append("worst matrices (energy lost in their outputs)")
    lines += [f"  {matrix['name']:<{width}}  {matrix['error']:.2%}  {matrix['scheme']}" for matrix in report["worst"]]
    starved = [
        f"  {matrix['name']}: {len(matrix['starved'])} of {len(matrix['routed'])}"
        for layer in report["layers"]
        for matrix in layer["matrices"]
        if matrix["starved"]
    ]
    if starved:
        lines += ["experts that saw too few tokens of their own and were calibrated on all", *starved]
    return "\n".join(lines)
