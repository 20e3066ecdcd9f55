"""A story in small: from a tokenizer and random weights through every stage to answers of a server, by the project's own commands."""

import contextlib
import io
import json
import math

import pytest

from ernie45.cli import main
from story.course import STAGES, Course, Plan
from story.page import write_page


def losses(out, stage):
    return [json.loads(line)["loss"] for line in (out / stage / "log.jsonl").read_text().splitlines()]


def here(words, folder, hear):
    """A command of ernie in this process: starting Python and torch nine times would take most of the test."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    for line in said.getvalue().splitlines():
        hear(line)
    return code


@pytest.mark.slow
@pytest.mark.timeout(900)  # 40 s on a quiet machine; on one that does other work it is many times that
def test_a_small_story_learns_and_is_told(tmp_path):
    plan = Plan(tmp_path / "out", tmp_path, scale=0.02, quick=True, workers=1)
    said = []
    Course(plan, said.append, here).run()
    curves = {stage: losses(plan.out, stage) for stage in STAGES}
    assert curves["text"][0] > math.log(900)  # random weights know nothing of a vocabulary of 1,024
    steps = [json.loads(line) for line in (plan.out / "joint" / "log.jsonl").read_text().splitlines()]
    seen = [step["vision_loss"] for step in steps if "vision_loss" in step]  # captions; text comes by turns
    assert seen[-1] < 0.75 * seen[0]
    assert curves["sft"][-1] < 0.85 * curves["sft"][0]
    exams = {stage: json.loads((plan.out / "exam" / f"{stage}.json").read_text()) for stage in ("blank", "text", "packed")}
    assert exams["text"]["perplexity"] < 0.65 * exams["blank"]["perplexity"]
    assert exams["packed"].keys() >= {"groups", "thinking", "another picture"}
    served = json.loads((plan.out / "served.json").read_text())
    assert len(served) == 8  # two of each group
    papers = [paper for paper in json.loads((plan.out / "data" / "exam.json").read_text()) if paper["group"] == "how many"]
    assert [answer["asked"] for answer in served if answer["group"] == "how many"] == [paper["text"] for paper in papers[:2]]
    page = write_page(plan.out, root=tmp_path / "repository")
    assert page == tmp_path / "repository" / "docs" / "story.md"
    text = page.read_text()
    assert "not by `make story` itself" in text
    assert "{" not in text
    checkpoint = tmp_path / "repository" / "ernie45" / "models" / "sighted_model"
    assert {"config.json", "README.md", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in checkpoint.iterdir()}
    said.clear()
    Course(plan, said.append, here).run()
    assert all(line.endswith("done before") for line in said)
