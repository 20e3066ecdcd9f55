"""What is told of a run: the page with tables and pictures, the model's card, the checkpoint `sighted`; all from the run's files."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie45.errors import RunError
from ernie45.models.sighted import FOLDER
from story.charts import draw_answers, draw_losses
from story.course import STAGES
from story.scenes import SIDE
from story.words import COUNTRIES, THINGS

_COLUMNS = ("blank", *STAGES, "packed")
_LARGEST = 40 << 20
_TITLES = {"text": "1 text", "vision": "2 vision", "joint": "3 joint", "sft": "4 fine-tuning", "dpo": "5 preferences"}
_WHOLE = 1.0


def write_page(out: Path, *, root: Path | None) -> Path:
    """Write the page of the run in `out`; with `root`, into that repository, and the checkpoint too. Returns the page's path.

    Raises RunError when the disk refuses or the checkpoint is too large to be passed on.
    """
    facts = _facts(out)
    place, shown = (out, "pictures") if root is None else (root / "docs", "pictures/story")
    page, pictures = place / "story.md", place / shown
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        draw_losses({_TITLES[stage]: facts["curves"][stage] for stage in STAGES}, pictures / "losses.png")
        draw_answers(facts["served"], out / "data" / "exam", pictures / "answers.png")
        page.write_text(_page(facts, shown), "utf-8")
        card = _card(facts)
        (out / "packed" / "README.md").write_text(card, "utf-8")
        if root is not None:
            _publish(out / "packed", root / FOLDER)
    except OSError as error:
        raise RunError(f"{page}: cannot be written: {error.strerror or error}") from error
    return page


def _publish(model: Path, target: Path) -> None:
    """The packed model as the checkpoint that the repository carries."""
    size = sum(file.stat().st_size for file in model.iterdir())
    if size > _LARGEST:
        raise RunError(f"{model}: has {size:,} bytes, and a checkpoint in the repository has at most {_LARGEST:,}")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial, ignore=shutil.ignore_patterns("quantisation.*"))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _facts(out: Path) -> dict[str, Any]:
    def read(name: str) -> Any:
        return json.loads((out / name).read_text("utf-8"))

    return {
        "plan": read("plan.json"),
        "parts": read("blank.json"),
        "data": read("data/facts.json"),
        "exams": {stage: read(f"exam/{stage}.json") for stage in _COLUMNS},
        "served": read("served.json"),
        "seconds": read("seconds.json"),
        "quantised": read("packed/quantisation.json"),
        "bytes": sum(file.stat().st_size for file in (out / "packed").glob("*.safetensors")),
        "curves": {stage: [json.loads(line) for line in (out / stage / "log.jsonl").read_text("utf-8").splitlines()] for stage in STAGES},
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _page(facts: Mapping[str, Any], pictures: str) -> str:
    quality = facts["quantised"]["quality"]
    filled = {
        "run": _run(facts),
        "minutes": f"{sum(facts['seconds'].values()) / 60:.0f}",
        "all": f"{facts['parts']['all'] / 1e6:.1f}",
        "active": f"{facts['parts']['active for a text token'] / 1e6:.1f}",
        "sources": _sources(facts),
        "pictures": f"{facts['data']['pictures']:,}",
        "side": SIDE,
        "exam": _exam_table(facts),
        "looking": _looking(facts),
        "folder": pictures,
        "steps": _steps(facts),
        "before": f"{quality['perplexity_before']:.2f}",
        "after": f"{quality['perplexity_after']:.2f}",
        "megabytes": f"{facts['bytes'] / 1e6:.1f}",
    }
    return _read("page.md").format_map(filled)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def _run(facts: Mapping[str, Any]) -> str:
    plan = facts["plan"]
    if plan["scale"] == _WHOLE and not plan["quick"]:
        return "`make story`"
    return f"a run cut down to {plan['scale']:g} of the whole (pictures and steps), not by `make story` itself"


def _sources(facts: Mapping[str, Any]) -> str:
    packages = facts["data"]["packages"]
    if not packages:
        return f"Text: {facts['data']['text']}. Pictures: drawn by the story itself. No package was fetched."
    rows = [[f"`{package['name']}`", package["version"], package["licence"], package["what"]] for package in packages]
    return _table(("package (npm)", "version", "licence", "what"), rows)


def _exam_table(facts: Mapping[str, Any]) -> str:
    exams = facts["exams"]
    last = exams["packed"]["groups"]
    rows = [["perplexity of text", "", *(f"{exams[stage]['perplexity']:.1f}" for stage in _COLUMNS)]]
    for group, mark in last.items():
        shares = [f"{_share(exams[stage]['groups'][group])}" for stage in _COLUMNS]
        rows.append([f"{group} ({mark['of']})", f"{100 * mark['chance']:.0f}", *shares])
    heads = ("random weights", "text", "vision", "joint", "fine-tuned", "preferences", "4 bits")
    return _table(("", "chance", *heads), rows)


def _share(mark: Mapping[str, float]) -> str:
    return f"{100 * mark['right'] / mark['of']:.0f}"


def _sum(marks: Mapping[str, Mapping[str, float]]) -> str:
    right, of = (sum(mark[part] for mark in marks.values()) for part in ("right", "of"))
    return f"{right:.0f} of {of:.0f}"


def _looking(facts: Mapping[str, Any]) -> str:
    final = facts["exams"]["packed"]
    of = sum(mark["of"] for mark in final["thinking"].values())
    right, exchanged, thinking, plain = (_sum(final[name]) for name in ("groups", "another picture", "thinking", "not thinking"))
    return (
        f"Does it look? When each question is shown with another picture of its group, the 4-bit model gets {exchanged} right instead of "
        f"{right}. Does thinking help? On the same {of:.0f} questions it gets {thinking} right after thinking and {plain} without."
    )


def _steps(facts: Mapping[str, Any]) -> str:
    rows = []
    for name, seconds in facts["seconds"].items():
        stage = name.removeprefix("training, ")
        steps = facts["curves"].get(stage) if stage != name else None
        told = "" if steps is None else f"{len(steps):,} steps, {sum(step['tokens'] for step in steps):,} tokens"
        rows.append([name, f"{seconds:,.0f} s", told])
    return _table(("step", "time", "learned"), rows)


def _card(facts: Mapping[str, Any]) -> str:
    marks = facts["exams"]["packed"]["groups"].items()
    rows = [[group, f"{mark['right']}", f"{mark['of']}", f"{100 * mark['chance']:.0f} %"] for group, mark in marks]
    filled = {name.replace(" ", "_"): f"{size:,}" for name, size in facts["parts"].items()}
    filled |= {"run": _run(facts), "things": len(THINGS), "countries": len(COUNTRIES), "side": SIDE, "sources": _sources(facts)}
    return _read("card.md").format_map(filled | {"exam": _table(("exam group", "right", "of", "chance"), rows)})
