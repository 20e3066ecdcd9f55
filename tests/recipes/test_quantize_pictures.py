"""Calibration with pictures: what sees is fitted to what it will see, as the rest is to text, and bad pictures are named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ernie45.errors import ConfigError
from ernie45.models.load import load_model
from ernie45.quant.methods import METHODS, Streams, quantise_block
from ernie45.quant.spec import Scheme
from ernie45.recipes.quantize import REPORT, QuantizeConfig, run
from ernie45.tokens.images import read_image
from ernie45.tokens.patches import patches
from tests.recipes.test_quantize_sight import sighted_decoder
from tests.sighted import RULES

TEXT = "The quick brown fox sees a lazy dog, and 7 cats see 23 birds on the red roof of the old house. " * 400
SMALL = {"window": 64, "calibration_tokens": 1024, "held_out_tokens": 256, "least_expert_tokens": 4, "hadamard": False, "group": 32}


@pytest.fixture(scope="module")
def files(put_photos, tmp_path_factory):
    """A folder of photographs, and text of two kinds."""
    place = tmp_path_factory.mktemp("pictures")
    put_photos(place / "photos", ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png"))
    (place / "calibration.txt").write_text(TEXT)
    (place / "held.txt").write_text(TEXT[50:])
    return place


def asked(seer, files, out, **changes):
    texts = {"calibration": files / "calibration.txt", "held_out": files / "held.txt"}
    return QuantizeConfig(model=str(seer), out=out, limit=9.0, **{**SMALL, **texts, **changes})


def in_report(out):
    report = json.loads((out / REPORT).read_text())
    return report, {matrix["name"]: matrix for layer in report["layers"] for matrix in layer["matrices"]}


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_what_sees_is_calibrated_on_pictures(seer, files, tmp_path, environment, method):
    out = tmp_path / "small"
    assert run(asked(seer, files, out, method=method, pictures=files / "photos", vision="w4a8"), environment) == 0
    report, named = in_report(out)
    assert report["calibration"]["pictures"] == 4
    experts = named["layers.1.ffn.vision.experts"]
    assert experts["tokens"] > 0
    assert experts["error"] < experts["nearest_error"], "fitted to pictures, it loses less on them than rounded to nearest"
    assert {matrix["name"].split(".")[1] for matrix in report["sight"]} == {"tower", "resampler"}
    assert len(report["sight"]) == 2 * 4 + 5, "four matrices a block of the tower, five of the resampler"
    lost, nearest = (sum(matrix[key] for matrix in report["sight"]) for key in ("error", "nearest_error"))
    assert lost < nearest
    decoder = load_model(out, dtype="float32")
    assert decoder.sight is not None


def test_smoothquant_with_pictures_runs_to_its_end(seer, files, tmp_path, environment):
    """Its factors are taken from pictures too; the folder answers about a picture almost as the model did, at 8 bits each way."""
    out, whole = tmp_path / "small", load_model(seer, dtype="float32")
    changes = {"method": "smooth", "scheme": "w8a8", "vision": "w8a8", "group": 0}
    assert run(asked(seer, files, out, pictures=files / "photos", **changes), environment) == 0
    report, named = in_report(out)
    assert report["calibration"]["pictures"] == 4
    assert named["layers.1.ffn.vision.experts"]["tokens"] > 0
    picture = read_image((files / "photos" / "coffee.png").read_bytes(), RULES)
    vision = whole.sight.config
    tokens = [1, 5, vision.image_start_id, *[vision.image_id] * picture.tokens, vision.image_end_id, 7, 8]
    pixels = [(torch.from_numpy(patches(picture, RULES)), picture.grid)]
    seen, lost = (decoder.prompt_logits(tokens, pixels) for decoder in (whole, load_model(out, dtype="float32")))
    assert (lost - seen).square().sum() < 0.01 * seen.square().sum()


def test_held_out_pictures_lose_less_than_by_rounding():
    """One block, scenes of correlated patches as photographs have: the second bank's error on scenes that calibration never saw."""
    torch.manual_seed(0)
    decoder, mixing = sighted_decoder(), torch.randn(12, 64)

    def scenes(count):
        x_SLD = torch.randn(count, 48, 12) @ mixing + 0.1 * torch.randn(count, 48, 64)
        seen_SL = torch.zeros(count, 48, dtype=torch.bool)
        seen_SL[:, 4:40] = True
        return x_SLD, seen_SL

    x_SLD, seen_SL = scenes(24)
    fresh_RD = decoder.layers[1].ffn_norm(scenes(8)[0].flatten(0, 1))
    wanted = decoder.layers[1].ffn.vision(fresh_RD)
    turns_LP = torch.polar(torch.ones(48, 16), torch.zeros(48, 16))
    whole = dict.fromkeys(("attn.qkv", "attn.out", "ffn.experts", "ffn.shared.gate_up", "ffn.shared.down"))
    lost = {}
    seeing = Streams(x_SLD, x_SLD, turns_LP, 8, None, seen_SL)
    for name, streams in (("rtn", None), ("gptq", seeing), ("awq+gptq", seeing)):
        block = sighted_decoder().layers[1]
        every = {f"b.{key}": value for key, value in (whole | {"ffn.vision.experts": Scheme.parse("w4a16-g32")}).items()}
        packed, (report,) = quantise_block(block, "b", every, METHODS[name], streams)
        assert report.tokens == (0 if streams is None else 24 * 36 * 2), "two experts for each seen token, and no other"
        # widening divides the norm: what the bank is given must come through the block's own
        given_RD = fresh_RD / decoder.layers[1].ffn_norm.weight * packed.ffn_norm.weight
        lost[name] = float((packed.ffn.vision(given_RD) - wanted).square().sum() / wanted.square().sum())
    assert lost["gptq"] < 0.8 * lost["rtn"]
    assert lost["awq+gptq"] < 0.8 * lost["rtn"]


def test_conversations_about_pictures_calibrate_too(seer, files, tmp_path, environment):
    message = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "photos/coffee.png"}}, {"type": "text", "text": "What?"}],
    }
    lines = [{"messages": [message, {"role": "assistant", "content": "A cup."}]}] * 3
    (files / "said.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "small"
    assert run(asked(seer, files, out, pictures=files / "said.jsonl", window=128), environment) == 0
    report, named = in_report(out)
    assert report["calibration"]["pictures"] == 3
    assert named["layers.1.ffn.vision.experts"]["tokens"] > 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", "bad.jsonl:1 is no JSON object with a list of messages"),
        ('{"messages": 5}', "bad.jsonl:1 is no JSON object"),
        ('{"messages": [{"role": "user", "content": "hello"}]}', "bad.jsonl:1 holds no picture"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}', "bad.jsonl:1: .*gone.png cannot be read"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "../../etc/passwd"}]}]}', "bad.jsonl:1: .*only files"),
        ("[" * 100_000, "bad.jsonl:1 is no JSON object"),
    ],
    ids=range(6),
)  # fmt: skip
def test_bad_conversations_are_named(seer, files, tmp_path, environment, line, says):
    (files / "bad.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=says):
        run(asked(seer, files, tmp_path / "x", pictures=files / "bad.jsonl"), environment)


def test_bad_folders_are_named(seer, files, tmp_path, environment):
    with pytest.raises(ConfigError, match="holds no image file"):
        run(asked(seer, files, tmp_path / "x", pictures=tmp_path), environment)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    with pytest.raises(ConfigError, match=r"torn\.png: "):
        run(asked(seer, files, tmp_path / "x", pictures=tmp_path), environment)
    with pytest.raises(ConfigError, match="cannot be read"):
        run(asked(seer, files, tmp_path / "x", pictures=tmp_path / "nothing"), environment)
    with pytest.raises(ConfigError, match="--method rtn looks at nothing"):
        asked(seer, files, tmp_path / "x", pictures=tmp_path, method="rtn")
    several = [{"type": "image", "image": "photos/coffee.png"}] * 3
    (files / "many.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": several}]}))
    with pytest.raises(ConfigError, match=r"many\.jsonl:1 takes [0-9]+ tokens; sequences have 64"):
        run(asked(seer, files, tmp_path / "x", pictures=files / "many.jsonl"), environment)


def test_large_pictures_are_shrunk_to_their_sequence(seer, files):
    from ernie45.models.load import open_model
    from ernie45.recipes.scenes import read_scenes
    from ernie45.tokens.tokenizer import load_tokenizer

    place = files / "large"
    place.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)).save(place / "a.png")
    (scene,) = read_scenes(place, open_model(seer), load_tokenizer(seer), 40, [[5] * 40])
    assert len(scene.tokens_L) == 40
    assert int(scene.seen_L.sum()) - 2 <= 30, "three quarters of the sequence, and two markers"
    assert scene.grids[0][1] * scene.grids[0][2] == len(scene.patches_SC)
    assert replace(RULES, image_max=30 * RULES.factor**2).size(300, 500) == tuple(RULES.patch * n for n in scene.grids[0][1:])
