"""Streaming between file tensors and parameters: values, views, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError
from ernie45.weights.rename import NameTable, Rule
from ernie45.weights.stream import check_finite, load_pieces, save_piece

TABLE = NameTable(
    "test",
    [
        Rule(ours="same", files=("s",)),
        Rule(ours="qkv", files=("q", "k", "v"), sizes=(4, 2, 2)),
        Rule(ours="turned", files=("t",), turned=True),
        Rule(ours="gate_up", files=("e.{expert}.g", "e.{expert}.u"), axis=1),
        Rule(ours="joined", files=("g", "u"), axis=1),
        Rule(ours="down", files=("e.{expert}.d",), axis=1, turned=True),
        Rule(ours="bias", files=("b",), row=0),
    ],
)
SHAPES = {"same": (5,), "qkv": (8, 3), "turned": (2, 6), "gate_up": (3, 4, 2), "joined": (2, 6, 3), "down": (3, 2, 5), "bias": (3,)}


class Held:
    """A source of tensors in memory that remembers what was given back."""

    owned = False

    def __init__(self, tensors):
        self.tensors, self.released = tensors, []

    def read(self, name):
        return self.tensors[name]

    def release(self, name):
        self.released.append(name)


def load(tensors, dtype=torch.float32, **options):
    plan = TABLE.load_plan({name: tuple(tensor.shape) for name, tensor in tensors.items()}, SHAPES)
    source = Held(tensors)
    return load_pieces(plan, source, SHAPES, lambda name: dtype, **options), source


def saved(ours, dtype=torch.float32):
    return {piece.file: save_piece(piece, ours[piece.ours], dtype) for piece in TABLE.save_plan(SHAPES)}


def numbered(dtype=torch.float32):
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def test_there_and_back_is_the_same():
    ours = numbered()
    back, source = load(saved(ours))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert sorted(source.released) == sorted(source.tensors), "everything was copied and given back"
    files = [tensor.untyped_storage().data_ptr() for tensor in source.tensors.values()]
    assert all(tensor.untyped_storage().data_ptr() not in files for tensor in back.values())


@pytest.mark.parametrize("owned", [True, False])
def test_what_needs_no_change_stays_where_it_is_when_asked_or_when_it_is_ours(owned, monkeypatch):
    monkeypatch.setattr(Held, "owned", owned)
    ours = numbered()
    back, source = load(saved(ours), mapped=not owned)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert sorted(source.released) == sorted(set(source.tensors) - {"s", "b"}), "what was copied is given back, views are kept"
    assert back["same"].data_ptr() == source.tensors["s"].data_ptr()
    assert back["bias"].data_ptr() == source.tensors["b"].data_ptr()


def test_the_file_form_is_what_the_rules_say():
    """Against the plain definition of each kind, not against the loader."""
    ours = numbered()
    files = saved(ours)
    assert torch.equal(files["k"], ours["qkv"][4:6])
    assert torch.equal(files["t"], ours["turned"].T)
    assert torch.equal(files["e.1.u"], ours["gate_up"][1, 2:])
    assert torch.equal(files["u"], ours["joined"][:, 3:])
    assert torch.equal(files["e.2.d"], ours["down"][2].T)
    assert torch.equal(files["b"], ours["bias"][None])
    assert all(tensor.is_contiguous() for tensor in files.values())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_converted(stored):
    ours = numbered(stored)
    back, _ = load(saved(ours, stored))
    assert all(back[name].dtype == torch.float32 and torch.equal(back[name], ours[name].float()) for name in ours)


def test_uint16_is_bfloat16_bits():
    ours = numbered(torch.bfloat16)
    files = {name: tensor.view(torch.uint16) for name, tensor in saved(ours, torch.bfloat16).items()}
    back, source = load(files, torch.bfloat16, mapped=True)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert back["same"].data_ptr() == source.tensors["s"].data_ptr()


@pytest.mark.parametrize("kind", [torch.int32, torch.float8_e4m3fn, torch.bool])
def test_types_that_are_no_weights_are_refused(kind):
    files = saved(numbered())
    files["v"] = torch.zeros_like(files["v"]).to(kind)
    with pytest.raises(CheckpointError, match="'v' is"):
        load(files)


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2999), st.sampled_from(["nan", "inf", "-inf"]))
def test_one_bad_element_is_found_wherever_it_is(dtype, place, value):
    tensor = torch.linspace(-60_000, 60_000, 3000).to(dtype)
    check_finite("w", tensor)
    tensor[place] = float(value)
    with pytest.raises(CheckpointError, match=r"'w' has 1 of 3,000 elements"):
        check_finite("w", tensor)


def test_bad_weights_are_refused_unless_asked_for():
    files = saved(numbered())
    files["t"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="'t' has 1 of 12"):
        load(files)
    back, _ = load(files, check=False)
    assert back["turned"].isnan().sum() == 1
    check_finite("empty", torch.empty(0))


def test_progress_ends_at_the_total():
    seen = []
    load(saved(numbered()), progress=lambda name, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
