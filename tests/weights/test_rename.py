"""Name tables: total, injective, and the same pieces in both directions."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError
from ernie45.weights.rename import Ignored, NameTable, Rule, fold_names

ROUTER = Rule(ours="l.{layer}.router", files=("r.{layer}",), either_way=True)
TABLE = NameTable(
    "test",
    [
        Rule(ours="same", files=("s",)),
        Rule(ours="l.{layer}.qkv", files=("q.{layer}", "k.{layer}", "v.{layer}"), sizes=(4, 2, 2)),
        Rule(ours="l.{layer}.turned", files=("t.{layer}",), turned=True),
        Rule(ours="l.{layer}.gate_up", files=("e.{layer}.{expert}.g", "e.{layer}.{expert}.u"), axis=1),
        Rule(ours="l.{layer}.down", files=("e.{layer}.{expert}.d",), axis=1, turned=True),
        Rule(ours="l.{layer}.bias", files=("b.{layer}",), row=0),
        ROUTER,
    ],
    [Ignored("extra.*", "not needed")],
)


@st.composite
def models(draw):
    """Parameters of a model that the table covers: name -> shape."""
    size = st.integers(1, 5)
    shapes = {"same": (draw(size),)}
    for layer in range(draw(st.integers(0, 12))):
        shapes[f"l.{layer}.qkv"] = (8, draw(size))
        shapes[f"l.{layer}.turned"] = (draw(size), draw(size))
        experts, width = draw(size), draw(size)
        shapes[f"l.{layer}.gate_up"] = (experts, 2 * draw(size), width)
        shapes[f"l.{layer}.down"] = (experts, draw(size), draw(size))
        shapes[f"l.{layer}.bias"] = (experts,)
        shapes[f"l.{layer}.router"] = (experts, width)
    return shapes


@given(models())
def test_boxes_tile_every_parameter_exactly_once(shapes):
    plan = TABLE.save_plan(shapes)
    painted = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
    for piece in plan:
        box = painted[piece.ours][tuple(slice(a, b) for a, b in piece.box)]
        box += 1
        assert box.numel() == math.prod(piece.shape)
        assert piece.whole == (box.numel() == painted[piece.ours].numel())
    assert all((p == 1).all() for p in painted.values())
    assert len({piece.file for piece in plan}) == len(plan), "two places share a file tensor"


@given(models())
def test_what_is_saved_is_what_is_loaded(shapes):
    saved = TABLE.save_plan(shapes)
    plan = TABLE.load_plan({piece.file: piece.shape for piece in saved}, shapes)
    assert plan.complete
    assert plan.explain() == ""
    assert plan.pieces == saved
    assert {TABLE.ours_of(piece.file) for piece in saved} == set(shapes)


@given(models(), st.data())
def test_every_disturbance_is_reported_and_nothing_else(shapes, data):
    available = {piece.file: piece.shape for piece in TABLE.save_plan(shapes)}
    gone = data.draw(st.sets(st.sampled_from(sorted(available))))
    bent = data.draw(st.sets(st.sampled_from(sorted(available)))) - gone
    added = data.draw(st.sets(st.sampled_from(["x", "q.99", "q.01", "e.0.0", "extra.1", "s.0", "\x1b[2J"])))
    found = {name: ((*shape, 7) if name in bent else shape) for name, shape in available.items() if name not in gone}
    plan = TABLE.load_plan(found | dict.fromkeys(added, (1,)), shapes)
    assert set(plan.missing) == gone
    assert {wrong.file for wrong in plan.wrong_shapes} == bent
    assert set(plan.unexpected) == added - {"extra.1"}
    assert dict(plan.ignored) == ({"extra.1": "not needed"} if "extra.1" in added else {})
    assert plan.complete == (not (gone or bent or added - {"extra.1"}))
    assert plan.explain().replace("\n", "").isprintable(), "a name from a file must not steer the terminal"


def test_orientation_is_decided_by_shape_and_assumed_when_square():
    table = NameTable("x", [ROUTER])
    for found, turned in (((3, 5), False), ((5, 3), True)):
        (piece,) = table.load_plan({"r.0": found}, {"l.0.router": (3, 5)}).pieces
        assert (piece.turned, piece.shape) == (turned, found)
    (piece,) = table.load_plan({"r.0": (4, 4)}, {"l.0.router": (4, 4)}).pieces
    assert piece.turned is False
    other = NameTable("x", [Rule(ours="p", files=("r",), either_way=True, turned=True)])
    (piece,) = other.load_plan({"r": (4, 4)}, {"p": (4, 4)}).pieces
    assert piece.turned is True


def test_a_row_may_come_with_or_without_its_leading_one():
    for found in ((1, 6), (6,)):
        (piece,) = TABLE.load_plan({"b.0": found}, {"l.0.bias": (6,)}).pieces
        assert piece.shape == found
    assert TABLE.load_plan({"b.0": (6, 1)}, {"l.0.bias": (6,)}).wrong_shapes[0].needed == (1, 6)


def test_parameters_without_a_name_are_reported_both_ways():
    assert TABLE.load_plan({}, {"other": (1,)}).uncovered == ("other",)
    with pytest.raises(CheckpointError, match=r"no name for:\n  other"):
        TABLE.save_plan({"other": (1,)})


def test_numbers_are_matched_as_written():
    assert TABLE.ours_of("q.10") == "l.10.qkv"
    assert TABLE.ours_of("q.010") is None
    assert TABLE.ours_of("q.-1") is None
    assert TABLE.ours_of("q.1\n") is None


@given(st.sets(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 6), st.integers(0, 6))))
def test_folded_names_are_exact(rows):
    names = [f"{text}.{i}.x{j}" for text, i, j in sorted(rows)]
    unfolded = [name for line, _ in fold_names(names) for name in unfold(line)]
    assert sorted(unfolded) == sorted(names)
    assert [count for _, count in fold_names(names)] == [len(unfold(line)) for line, _ in fold_names(names)]


def unfold(line):
    """The reverse of `fold_names` for one line."""
    match = re.search(r"\{([^}]*)\}", line)
    if not match:
        return [line]
    result = []
    for part in match[1].split(","):
        first, _, last = part.partition("..")
        for number in range(int(first), int(last or first) + 1):
            result += unfold(line[: match.start()] + str(number) + line[match.end() :])
    return result


def test_a_report_stays_readable():
    names = [f"model.layers.{i}.mlp.gate.weight" for i in range(3, 28)]
    assert fold_names(names) == [("model.layers.{3..27}.mlp.gate.weight", 25)]
    plan = TABLE.load_plan({"x" * (i + 1): (1,) for i in range(500)}, {})
    assert plan.explain().count("\n") == 41
    assert plan.explain().endswith("and 460 more")
