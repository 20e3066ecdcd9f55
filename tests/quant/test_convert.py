"""A model converted layer by layer, killed and gone on with, and loaded from its packed folder; and folders that are not whole."""

import json
import shutil

import pytest
import torch

from ernie45.errors import CheckpointError, ConfigError, ErnieError
from ernie45.models.by_layer import LayeredModel
from ernie45.models.load import load_model, open_model
from ernie45.models.packed import packed_entry
from ernie45.models.save import save_model
from ernie45.quant.convert import Plan, convert, leave_only_model
from ernie45.quant.linear import QuantEmbedding, QuantExperts
from ernie45.quant.methods import METHODS
from ernie45.quant.spec import QuantSpec, Rule
from ernie45.weights.safetensors import open_safetensors
from ernie45.weights.safetensors_write import save_safetensors

SPEC = QuantSpec.uniform("w4a8-g32", head="w8a8")


def text(seed: int, sequences: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 160, (sequences, length), generator=torch.Generator().manual_seed(seed))


def plan(method: str = "gptq", spec: QuantSpec = SPEC, fingerprint: str = "a") -> Plan:
    return Plan(
        spec=spec,
        method=METHODS[method],
        calibration_SL=text(1),
        held_out_SL=text(2, sequences=3),
        least_expert_tokens=4,
        fingerprint=fingerprint,
    )


def silent(what: str, done: int, total: int) -> None:
    pass


def converted(decoder, place, spec: QuantSpec = SPEC, method: str = "gptq"):
    """(the result, the finished folder)"""
    save_model(decoder, place / "float")
    source = LayeredModel(open_model(place / "float"))
    result = convert(source, plan(method, spec), place / "packed", silent)
    leave_only_model(place / "packed")
    body = decoder.config.to_hf() | {"quantization_config": packed_entry(spec, method)}
    (place / "packed" / "config.json").write_text(json.dumps(body))
    return result, place / "packed"


@pytest.mark.parametrize("kind", [{}, {"experts": True}, {"bias": True}, {"tied": False}, {"mtp": 1}])
def test_the_loaded_folder_is_what_was_measured(tiny, tmp_path, kind) -> None:
    decoder = tiny(**kind)
    head = SPEC if kind.get("tied", True) else QuantSpec(rules=(Rule(pattern="head", scheme="w8a8"), Rule(pattern="*", scheme="w4a8-g32")))
    if not kind.get("tied", True):
        spec = head
    else:
        spec = QuantSpec(rules=(Rule(pattern="embed", scheme="w8a8"), Rule(pattern="*", scheme="w4a8-g32")))
    result, folder = converted(decoder, tmp_path, spec)
    loaded = load_model(folder, dtype="float32")
    assert isinstance(loaded.embed, QuantEmbedding) == kind.get("tied", True)
    assert isinstance(getattr(loaded.layers[1].ffn, "experts", None), QuantExperts) == bool(kind.get("experts"))
    # the same perplexity, computed by whole passes of the two whole models
    losses = []
    for model in (decoder, loaded):
        scores = torch.cat([model.prompt_logits(row.tolist())[:-1].log_softmax(-1) for row in text(2, sequences=3)])
        following = torch.cat([row[1:] for row in text(2, sequences=3)])
        losses.append(float(-scores.gather(1, following[:, None]).double().mean()))
    assert result.quality.perplexity_before == pytest.approx(2.718281828459045 ** losses[0], rel=1e-5)
    assert result.quality.perplexity_after == pytest.approx(2.718281828459045 ** losses[1], rel=1e-4)
    assert result.quality.divergence > 0
    assert [layer.layer for layer in result.layers] == [0, 1, 2]
    assert result.layers[2].drift > result.layers[0].drift > 0


def test_packed_tensors_stay_where_they_are_mapped_when_asked_to(tiny, tmp_path) -> None:
    _, folder = converted(tiny(), tmp_path, method="rtn")
    loaded = load_model(folder, dtype="float32", mapped=True)
    shard = next(folder.glob("model-00002-*"))
    for tensor in (loaded.layers[0].attn.qkv.weight_packed, loaded.layers[0].ffn.down.weight_scale):
        # a view of the whole mapped file, not a tensor of its own
        assert tensor.untyped_storage().nbytes() >= tensor.nbytes
        assert not tensor.untyped_storage().resizable()
    assert shard.is_file()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_at", [1, 2, 4])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tiny, tmp_path, killed_at: int) -> None:
    result, folder = converted(tiny(experts=True), tmp_path)
    source = LayeredModel(open_model(tmp_path / "float"))

    def killing(what: str, done: int, total: int) -> None:
        if done == killed_at:
            raise Killed

    again = tmp_path / "again"
    with pytest.raises(Killed):
        convert(source, plan(), again, killing)
    second = convert(source, plan(), again, silent)
    assert second.resumed_at == min(killed_at - 1, 3)
    assert second.quality == result.quality
    assert second.layers == result.layers
    leave_only_model(again)
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()} - {"config.json"}
    for path in again.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_another_run_does_not_go_on_with_it(tiny, tmp_path) -> None:
    save_model(tiny(), tmp_path / "float")
    source = LayeredModel(open_model(tmp_path / "float"))
    work = tmp_path / "work"
    assert convert(source, plan(fingerprint="a"), work, silent).resumed_at == 0
    assert convert(source, plan(fingerprint="b"), work, silent).resumed_at == 0
    assert convert(source, plan(fingerprint="b"), work, silent).resumed_at == 3
    next(work.glob("model-00003-*")).unlink()  # a shard went missing: begin anew
    assert convert(source, plan(fingerprint="b"), work, silent).resumed_at == 0


def test_rules_and_matrices_must_meet(tiny, tmp_path) -> None:
    save_model(tiny(), tmp_path / "float")
    source = LayeredModel(open_model(tmp_path / "float"))
    nothing = QuantSpec(rules=(Rule(pattern="layers.*.attn.kvq", scheme="w8a8"), Rule(pattern="*", scheme="w4a8")))
    with pytest.raises(ConfigError, match=r"kvq.*fits no module"):
        convert(source, plan(spec=nothing), tmp_path / "work", silent)
    partial = QuantSpec(rules=(Rule(pattern="layers.*", scheme="w4a8"),))
    with pytest.raises(ConfigError, match="embed"):
        convert(source, plan(spec=partial), tmp_path / "work", silent)
    assert not (tmp_path / "work").exists()


def test_matrices_left_whole_stay_as_they_were(tiny, tmp_path) -> None:
    decoder = tiny()
    spec = QuantSpec(
        rules=(Rule(pattern="embed", scheme=None), Rule(pattern="layers.0.*", scheme=None), Rule(pattern="*", scheme="w8a8-g32"))
    )
    _, folder = converted(decoder, tmp_path, spec, "rtn")
    loaded = load_model(folder, dtype="float32")
    assert torch.equal(loaded.embed.weight, decoder.embed.weight)
    assert torch.equal(loaded.layers[0].ffn.down.weight, decoder.layers[0].ffn.down.weight)


@pytest.fixture
def packed(tiny, tmp_path):
    return converted(tiny(), tmp_path, method="rtn")[1]


def rewrite(folder, change) -> None:
    """Replace the shards by one file with changed tensors."""
    with open_safetensors(folder) as files:
        tensors = {name: files.read(name).clone() for name in files}
    for path in folder.glob("model*"):
        path.unlink()
    change(tensors)
    save_safetensors(folder, tensors.items())


def set_rules(folder, rules) -> None:
    body = json.loads((folder / "config.json").read_text())
    body["quantization_config"]["rules"] = rules
    (folder / "config.json").write_text(json.dumps(body))


NAME = "layers.1.ffn.down.weight_"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(NAME + "scale"), "missing"),
        (lambda t: t.update({NAME + "packed": t[NAME + "packed"][:-1]}), "wrong shape"),
        (lambda t: t.update({NAME + "packed": t[NAME + "packed"].float()}), "packed weights are uint8"),
        (lambda t: t[NAME + "scale"].view(-1)[3:4].fill_(float("nan")), "NaN or infinite"),
        (lambda t: t.update({"layers.1.ffn.down.weight": torch.zeros(64, 96)}), "not expected"),
    ],
)
def test_damaged_tensors_are_refused_by_name(packed, change, text: str) -> None:
    rewrite(packed, change)
    with pytest.raises(CheckpointError, match=rf"(?s)(layers\.1\.ffn\.down.*{text}|{text}.*layers\.1\.ffn\.down)"):
        load_model(packed)


def test_truncated_shards_and_other_specs_are_refused(packed) -> None:
    shard = next(packed.glob("model-00002-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(packed)
    shard.write_bytes(whole)
    for rules, text in (
        ([{"pattern": "embed", "scheme": "w8a8"}, {"pattern": "*", "scheme": "w4a8-g64"}], "wrong shape"),
        ([{"pattern": "embed", "scheme": "w8a8"}, {"pattern": "*", "scheme": "w3a8-g64"}], "no.*scheme"),
        ([{"pattern": "nothing", "scheme": "w8a8"}, {"pattern": "*", "scheme": "w4a8-g32"}], "fits no module"),
        ([{"pattern": "*", "schema": "w8a8"}], "schema"),
        ("w4a8", "rules"),
    ):
        set_rules(packed, rules)
        with pytest.raises(ErnieError, match=f"(?s){text}"):
            load_model(packed)


def test_a_later_format_is_refused(packed) -> None:
    body = json.loads((packed / "config.json").read_text())
    body["quantization_config"]["version"] = 2
    (packed / "config.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="packed format version 2; this version reads 1"):
        load_model(packed)


def test_a_full_disk_ends_the_run_with_the_numbers(tiny, tmp_path, monkeypatch) -> None:
    save_model(tiny(), tmp_path / "float")
    source = LayeredModel(open_model(tmp_path / "float"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CheckpointError, match="100 free"):
        convert(source, plan("rtn"), tmp_path / "work", silent)
