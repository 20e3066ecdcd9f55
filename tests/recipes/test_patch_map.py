"""`ernie inspect --image`: the facts it tells, and a drawing whose lines are where the patches end."""

import json
import re

import pytest
from PIL import Image

from ernie45.cli import main
from ernie45.recipes.patch_map import draw_map, see, write_map
from ernie45.tokens.images import read_image
from ernie45.tokens.pictures import PixelRules
from tests.hostile_files import images


@pytest.fixture
def cat(photo, tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(photo("chelsea.png"))
    return path


def test_the_command_writes_a_map_and_tells_what_is_in_it(cat, capsys):
    assert main(["inspect", "--image", str(cat)]) == 0
    said = capsys.readouterr().out
    for fact in ("451 x 300 pixels", "448 x 308", "704: 22 rows of 32", "176: 11 rows of 16", "stands 16 later", "cat.patches.png"):
        assert fact in said
    with Image.open(cat.with_suffix(".patches.png")) as drawn:
        assert drawn.size > (448, 308)


def test_json_and_a_place_of_ones_own(cat, tmp_path, capsys):
    assert main(["inspect", "--image", str(cat), "--out", str(tmp_path / "map.png"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["grid"] == [1, 22, 32]
    assert told["tokens"] == 176
    assert told["size"] == [300, 451]
    with Image.open(told["map"]) as drawn:
        assert drawn.format == "PNG"


def test_lines_are_where_patches_and_tokens_end(cat):
    seen = see(cat, PixelRules())
    sheet = draw_map(seen)
    scale, left = 3, 40
    top = sheet.height - 40 - 308 * scale
    inside = sheet.getpixel((left + 7 * scale, top + 7 * scale))
    edge = sheet.getpixel((left + 28 * scale, top + 40 * scale))
    assert edge[0] > 200 > edge[1] + 60  # red where a token ends
    assert edge != inside
    plain = Image.frombytes("RGB", (448, 308), seen.picture.rgb)
    assert sheet.getpixel((left + 20 * scale, top + 20 * scale)) == plain.getpixel((20, 20))


def test_small_cells_carry_no_numbers_and_thin_pictures_are_drawn(tmp_path):
    for size in ((1, 1), (2100, 10), (10, 2100), (4000, 3000)):
        path = tmp_path / "picture.png"
        Image.new("RGB", size, (90, 90, 90)).save(path)
        write_map(see(path, PixelRules()), tmp_path / "map.png")


def test_hostile_images_are_drawn_or_refused(tmp_path, capsys):
    for name, (data, refusal) in images().items():
        (tmp_path / "stranger").write_bytes(data)
        ended = main(["inspect", "--image", str(tmp_path / "stranger"), "--out", str(tmp_path / "map.png"), "--json"])
        said = capsys.readouterr()
        if refusal is None:
            assert json.loads(said.out)["tokens"] == read_image(data, PixelRules()).tokens, name
        else:
            assert ended == 2, name
            assert re.search(f"stranger.*({refusal})", said.err), (name, said.err)


def test_a_models_own_rules_are_used(cat, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps({"max_pixels": 100 * 28 * 28}))
    assert main(["inspect", str(folder), "--image", str(cat), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "missing.png"], "missing.png cannot be read: No such file"),
        (["--image", __file__], "no image of a known format"),
        (["--image", "{cat}", "--out", "map.jpg"], "map.jpg must end in .png"),
        (["--image", "{cat}", "--out", "no/such/folder/map.png"], "cannot write no/such/folder/map.png"),
        (["--image", "{cat}", "--check"], "give one of them"),
        (["{cat}", "--image", "{cat}"], "is no model folder"),
        ([], "needs a model folder or file"),
        (["model", "--out", "x.png"], "are for --image"),
    ],
)
def test_mistakes_are_named(cat, arguments, says, capsys):
    assert main(["inspect", *(argument.replace("{cat}", str(cat)) for argument in arguments)]) == 2
    assert says in capsys.readouterr().err


def test_the_experts_of_a_model_that_sees_are_drawn_below(cat, tmp_path, capsys):
    from tests.sighted import sighted_folder

    folder = sighted_folder(tmp_path / "model")
    assert main(["inspect", str(folder), "--image", str(cat), "--out", str(tmp_path / "plain.png")]) == 0
    assert main(["inspect", str(folder), "--image", str(cat), "--out", str(tmp_path / "map.png"), "--experts"]) == 0
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "map.png") as drawn:
        assert drawn.height > plain.height + 50
        below = drawn.crop((0, plain.height, drawn.width, drawn.height))
        assert len(below.convert("RGB").getcolors(100_000)) > 8  # each expert has its colour
    assert main(["inspect", "--image", str(cat), "--experts"]) == 2
    assert "--experts needs a model" in capsys.readouterr().err


def test_the_experts_are_those_the_router_chooses():
    import torch

    from ernie45.nn.moe import MixtureOfExperts
    from ernie45.recipes.expert_map import experts_of
    from ernie45.recipes.patch_map import Seen
    from tests.sighted import RULES, noise, sighted_decoder

    decoder, seen = sighted_decoder(), Seen("noise", 1, 1, noise(3, 4))
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    chosen = experts_of(decoder, seen, RULES)
    layers = [n for n, block in enumerate(decoder.layers) if isinstance(block.ffn, MixtureOfExperts)]
    assert list(chosen) == layers
    assert all(len(experts) == 12 and set(experts) <= set(range(8)) for experts in chosen.values())
    assert len({tuple(experts) for experts in chosen.values()}) > 1
    assert not any(block.ffn.vision.router._forward_hooks for block in decoder.layers if isinstance(block.ffn, MixtureOfExperts))
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
