"""The name tables against real checkpoints, and against each other."""

import hashlib
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.names import LAYOUTS, detect_layout, has_mtp, name_table
from ernie45.models.released import CHECKPOINTS
from ernie45.models.text import Decoder
from ernie45.weights.stream import load_pieces, save_piece

# SHA-256 over the sorted lines "name [shape]" of all tensors of the published ERNIE-4.5-300B-A47B-Paddle (121 shards, June 2025).
REAL_300B = "949b243c97976705725c8353e140584d9f379e55fc4d9fe7ba509ed56c502b81"
COMPACT = Path(__file__).parents[1] / "data" / "ernie_300b_a47b_paddle_tensors.txt"


def shapes_of(config):
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}


def expand(line):
    """One compact line, `a.{0..2}.b [3, 4]`, as the names and shape it stands for."""
    name, _, shape = line.partition(" ")
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", name)
    ranges = [range(int(first), int(last) + 1) for first, last in zip(parts[1::3], parts[2::3], strict=True)]
    for numbers in itertools.product(*ranges):
        yield "".join(text + str(number) for text, number in zip(parts[::3], (*numbers, ""), strict=True)), shape


def real_300b():
    pairs = [pair for line in COMPACT.read_text().splitlines() for pair in expand(line)]
    digest = hashlib.sha256("\n".join(sorted(f"{name} {shape}" for name, shape in pairs)).encode()).hexdigest()
    assert digest == REAL_300B
    assert len(pairs) == 6855
    return {name: tuple(map(int, shape.strip("[]").split(","))) for name, shape in pairs}


def test_every_tensor_of_the_real_300b_has_its_place():
    config = replace(CHECKPOINTS["ERNIE-4.5-300B-A47B"].text, num_mtp=0)
    real = real_300b()
    layout = detect_layout(real, "300B")
    assert layout == ("paddle", "ernie", "")
    plan = name_table(config, layout).load_plan(real, shapes_of(config))
    assert plan.explain() == ""
    assert plan.ignored == {}
    assert {piece.file for piece in plan.pieces} == set(real)
    # and back: what would be saved is that very list
    assert {piece.file: piece.shape for piece in name_table(config, layout.name).save_plan(shapes_of(config))} == real


def test_the_pt_names_of_the_published_21b():
    """Counts and shapes of the fact sheet of the published files."""
    config = CHECKPOINTS["ERNIE-4.5-21B-A3B"].text
    files = {piece.file: piece.shape for piece in name_table(config, "pt").save_plan(shapes_of(config))}
    assert files["model.layers.27.mlp.experts.63.up_proj.weight"] == (1536, 2560)
    assert files["model.layers.1.mlp.moe_statics.e_score_correction_bias"] == (1, 64)
    assert files["model.layers.1.mlp.shared_experts.down_proj.weight"] == (2560, 3072)
    assert files["model.mtp_linear_proj.0.weight"] == (2560, 5120)
    assert "lm_head.weight" not in files
    # embedding, norm; 6 attention and norm tensors a layer; 3 dense; 64 * 3 + 3 + 2 for 27 expert layers; MTP: 9 of a block and 3
    assert len(files) == 2 + 28 * 6 + 3 + 27 * (64 * 3 + 3 + 2) + 12


def test_the_gguf_names_of_the_published_21b_base():
    config = CHECKPOINTS["ERNIE-4.5-21B-A3B-Base"].text
    files = name_table(config, "gguf").save_plan(shapes_of(config))
    assert len(files) == 389, "the count of the published GGUF"


def test_an_mtp_projection_uploaded_transposed_is_turned():
    config = CHECKPOINTS["ERNIE-4.5-300B-A47B"].text
    table = name_table(config, "pt")
    files = {piece.file: piece.shape for piece in table.save_plan(shapes_of(config))}
    files["model.mtp_linear_proj.0.weight"] = (16_384, 8192)
    plan = table.load_plan(files, shapes_of(config))
    assert plan.complete
    assert [piece.file for piece in plan.pieces if piece.turned] == ["model.mtp_linear_proj.0.weight"]


@st.composite
def configs(draw, gguf=False):
    size = st.integers(1, 3)
    layers, kv = draw(st.integers(1, 3)), draw(size)
    experts = None
    if draw(st.booleans()):
        first = draw(st.integers(0, layers - 1))
        experts = ExpertsConfig(
            num_experts=draw(st.integers(2, 4)),
            top_k=1,
            expert_size=draw(size),
            num_shared=draw(st.integers(0, 2)),
            first_layer=first,
            last_layer=draw(st.integers(first, layers - 1)),
            interval=draw(st.integers(1, 2)),
        )
    return TextConfig(
        hidden_size=draw(size) * 2 + 1,
        num_layers=layers,
        num_heads=kv * draw(size),
        num_kv_heads=kv,
        head_size=2 * draw(size),
        ffn_size=draw(size),
        vocab_size=draw(size) + 4,
        tie_embeddings=draw(st.booleans()),
        use_bias=not gguf and draw(st.booleans()),
        experts=experts,
        num_mtp=0 if gguf else draw(st.integers(0, 1)),
    )


class Held(dict):
    owned = False

    def read(self, name):
        return self[name]

    def release(self, name):
        assert name in self


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_every_model_survives_the_round_trip_in_every_layout(layout, data):
    config = data.draw(configs(gguf=layout == "gguf"))
    shapes = shapes_of(config)
    table = name_table(config, layout)
    ours = {name: torch.randn(shape) for name, shape in shapes.items()}
    files = Held((piece.file, save_piece(piece, ours[piece.ours], torch.float32)) for piece in table.save_plan(shapes))
    if layout != "gguf":
        assert detect_layout(files, "x")[0] in {layout, "pt"}
        assert has_mtp(files) == bool(config.num_mtp)
    plan = table.load_plan({name: tuple(tensor.shape) for name, tensor in files.items()}, shapes)
    back = load_pieces(plan, files, shapes, lambda name: torch.float32)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_names_of_other_families_are_refused():
    with pytest.raises(CheckpointError, match=r"not of the ERNIE 4.5 family \(first: transformer.h.\{0..2\}.w"):
        detect_layout([f"transformer.h.{i}.w" for i in range(3)], "here")
    with pytest.raises(CheckpointError, match="vision"):
        detect_layout(["model.embed_tokens.weight", "vision_model.ln.weight"], "here")
    with pytest.raises(CheckpointError, match="first: none"):
        detect_layout([], "here")
