"""Packed files that lie, activations that overflow, full disks, a kill: each a clear error, and no folder that looks finished."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie45.errors import CheckpointError, ConfigError, ErnieError
from ernie45.models.by_layer import LayeredModel
from ernie45.models.compressed_export import export_compressed
from ernie45.models.load import load_model, open_model
from ernie45.models.packed import packed_entry
from ernie45.models.save import save_model
from ernie45.quant.convert import Plan, convert, leave_only_model
from ernie45.quant.methods import METHODS
from ernie45.quant.spec import QuantSpec
from ernie45.quant.survey import survey
from ernie45.weights import safetensors_write
from ernie45.weights.safetensors import INDEX_NAME

SPEC = QuantSpec.uniform("w4a16-g32", head="w8a16")


def text(sequences: int = 3) -> torch.Tensor:
    return torch.randint(0, 160, (sequences, 24), generator=torch.Generator().manual_seed(1))


def plan(method: str = "gptq") -> Plan:
    return Plan(spec=SPEC, method=METHODS[method], calibration_SL=text(), held_out_SL=text(), least_expert_tokens=4, fingerprint="a")


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def packed_once(tiny, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("whole")
    save_model(tiny(), place / "float")
    convert(LayeredModel(open_model(place / "float")), plan("rtn"), place / "packed", silent)
    leave_only_model(place / "packed")
    body = tiny().config.to_hf() | {"quantization_config": packed_entry(SPEC, "rtn")}
    (place / "packed" / "config.json").write_text(json.dumps(body))
    load_model(place / "packed")  # whole, before anything is changed
    return place / "packed"


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A packed folder of the test's own, and its second shard."""
    shutil.copytree(packed_once, tmp_path / "packed")
    return tmp_path / "packed", next((tmp_path / "packed").glob("model-00002-*"))


def with_header(shard: Path, change: Callable[[dict], object]) -> None:
    """The shard with its JSON header changed, data as it was."""
    whole = shard.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    shard.write_bytes(len(new).to_bytes(8, "little") + new + whole[8 + length :])


VALUES, SCALES = "layers.0.ffn.down.weight_packed", "layers.0.ffn.down.weight_scale"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda h: h[VALUES].update(data_offsets=[h[VALUES]["data_offsets"][0] + 10**9, h[VALUES]["data_offsets"][1] + 10**9]),
            "1,000,000,000 bytes unused before it",
        ),
        (lambda h: h[VALUES].update(data_offsets=list(reversed(h[VALUES]["data_offsets"]))), "in order"),
        (lambda h: h[VALUES].update(data_offsets=h[SCALES]["data_offsets"]), "needs .* bytes and its offsets span"),
        (lambda h: h[VALUES].update(shape=[1 << 40, 1 << 40, 64]), "needs .* bytes"),
        (lambda h: h[VALUES].update(shape=[-4, 12, 64]), "natural"),
        (lambda h: h[VALUES].update(dtype="I8"), "int8; packed weights are uint8"),
        (lambda h: h[SCALES].update(dtype="I16"), "int16"),
        (lambda h: h[SCALES].update(dtype="Q9"), "'Q9', which is not read"),
        (lambda h: h[VALUES].update(data_offsets=[place - 8 for place in h[VALUES]["data_offsets"]]), "overlaps the tensor before it"),
        (lambda h: h.update({"layers.0.ffn.down.weight_zero": h.pop(SCALES)}), "says is in no file at all"),
    ],
)
def test_hostile_headers_are_refused(packed, change, said: str) -> None:
    folder, shard = packed
    with_header(shard, change)
    with pytest.raises(CheckpointError, match=f"(?s){said}"):
        load_model(folder)


@pytest.mark.parametrize("cut", [1, 100, 4096])
def test_truncated_shards_are_refused(packed, cut: int) -> None:
    folder, shard = packed
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=r"truncated|end"):
        load_model(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_no_numbers_are_refused_by_name(packed, bad: float) -> None:
    folder, shard = packed
    whole = bytearray(shard.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    at = 8 + length + json.loads(whole[8 : 8 + length])[SCALES]["data_offsets"][0]
    whole[at + 2 : at + 4] = torch.tensor([bad]).half().numpy().tobytes()
    shard.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.down\.weight_scale.*NaN or infinite"):
        load_model(folder)


@pytest.mark.parametrize(
    ("rules", "kind", "said"),
    [
        ([{"pattern": "embed", "scheme": "w8a16"}, {"pattern": "*", "scheme": "w4a16-g128"}], CheckpointError, "wrong shape"),
        ([{"pattern": "embed", "scheme": "w8a16"}, {"pattern": "*", "scheme": "w4a16-g48"}], ConfigError, "not a quantisation scheme"),
        ([{"pattern": "embed", "scheme": "w8a16"}, {"pattern": "*", "scheme": "fp8-block"}], CheckpointError, "missing"),
        ([{"pattern": "layers.9.*", "scheme": "w8a16"}, {"pattern": "*", "scheme": "w4a16-g32"}], ConfigError, "fits no module"),
        ([{"pattern": "embed", "scheme": "w8a16"}], ConfigError, "no quantisation rule speaks of"),
    ],
)
def test_settings_of_another_model_are_refused(packed, rules: list, kind: type[ErnieError], said: str) -> None:
    folder, _ = packed
    body = json.loads((folder / "config.json").read_text())
    body["quantization_config"]["rules"] = rules
    (folder / "config.json").write_text(json.dumps(body))
    with pytest.raises(kind, match=f"(?s){said}"):
        load_model(folder)


@pytest.mark.parametrize(("method", "factor"), [("gptq", 1e30), ("awq", 1e30), ("rtn", 1e30), ("gptq", 1e13)])
def test_activations_that_overflow_end_the_run_by_name(tiny, tmp_path: Path, method: str, factor: float) -> None:
    """Finite weights; infinite hidden states, or (1e13) finite ones without a finite square."""
    decoder = tiny()
    decoder.layers[1].ffn.gate_up.weight.mul_(factor)
    save_model(decoder, tmp_path / "float")
    with pytest.raises(CheckpointError, match=r"'layers\.1' gives NaN, infinities or values too large to square"):
        convert(LayeredModel(open_model(tmp_path / "float")), plan(method), tmp_path / "work", silent)
    assert not (tmp_path / "work" / INDEX_NAME).exists()
    with pytest.raises(ErnieError):
        load_model(tmp_path / "work")


def test_needs_are_not_measured_on_activations_that_overflow(tiny, tmp_path: Path) -> None:
    decoder = tiny()
    decoder.layers[1].attn.out.weight.mul_(1e25)
    save_model(decoder, tmp_path / "float")
    with pytest.raises(CheckpointError, match=r"'layers\.1' gives NaN, infinities"):
        survey(LayeredModel(open_model(tmp_path / "float")), text(), ("w4a8-g32", "w8a8-g32"), 4, silent)


@pytest.mark.parametrize("writes", [1, 4, 6])  # of the seven: the ends, then shard and streams of three layers
def test_a_disk_that_fills_up_leaves_nothing_that_loads_and_the_run_goes_on_later(tiny, tmp_path: Path, monkeypatch, writes: int) -> None:
    save_model(tiny(), tmp_path / "float")
    source = LayeredModel(open_model(tmp_path / "float"))
    convert(source, plan("rtn"), tmp_path / "calm", silent)
    count, sync = iter(range(100)), os.fsync

    def full(descriptor: int) -> None:
        if next(count) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors_write.os, "fsync", full)
        with pytest.raises(CheckpointError, match="disk became full"):
            convert(source, plan("rtn"), tmp_path / "work", silent)
    assert not (tmp_path / "work" / INDEX_NAME).exists()
    with pytest.raises(ErnieError):
        load_model(tmp_path / "work")
    convert(source, plan("rtn"), tmp_path / "work", silent)  # there is room again
    for path in (tmp_path / "calm").glob("model*"):
        assert path.read_bytes() == (tmp_path / "work" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("refused", ["state.json", INDEX_NAME])
def test_the_small_files_are_written_whole_or_not_at_all(tiny, tmp_path: Path, monkeypatch, refused: str) -> None:
    save_model(tiny(), tmp_path / "float")
    source = LayeredModel(open_model(tmp_path / "float"))
    write = Path.write_text

    def full(path: Path, content: str, encoding: str | None = None) -> int:
        if path.name.startswith(refused):
            write(path, content[: len(content) // 2], encoding=encoding)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content, encoding=encoding)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(CheckpointError, match=f"{refused}: cannot be written: No space left"):
            convert(source, plan("rtn"), tmp_path / "work", silent)
    assert not list((tmp_path / "work").glob(f"{refused}*"))
    assert convert(source, plan("rtn"), tmp_path / "work", silent).resumed_at == (0 if refused == "state.json" else 3)


def run_to_death_in_a_write(original: str, work: str) -> None:
    """Convert, and end by SIGKILL within the fifth file, the streams behind the second layer: for a process of its own."""
    torch.set_num_threads(1)
    count, sync = iter(range(100)), os.fsync

    def killing(descriptor: int) -> None:
        if next(count) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    safetensors_write.os.fsync = killing
    convert(LayeredModel(open_model(Path(original))), plan(), Path(work), silent)


def test_after_kill_9_the_run_goes_on_and_ends_with_the_same_bytes(tiny, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "float")
    source = LayeredModel(open_model(tmp_path / "float"))
    calm = convert(source, plan(), tmp_path / "calm", silent)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_bad_input as t; t.run_to_death_in_a_write(*sys.argv[2:])"
    arguments = [str(Path(__file__).parent), str(tmp_path / "float"), str(tmp_path / "work")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "work" / INDEX_NAME).exists()
    with pytest.raises(ErnieError):
        load_model(tmp_path / "work")
    second = convert(source, plan(), tmp_path / "work", silent)
    assert second.resumed_at == 1
    assert (second.quality, second.layers) == (calm.quality, calm.layers)
    for place in (tmp_path / "calm", tmp_path / "work"):
        leave_only_model(place)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {path.name for path in (tmp_path / "calm").iterdir()}
    for path in (tmp_path / "calm").iterdir():
        assert path.read_bytes() == (tmp_path / "work" / path.name).read_bytes(), path.name


def test_a_real_limit_on_file_sizes_is_told(tiny, tmp_path: Path) -> None:
    """The system refuses the bytes itself."""
    save_model(tiny(), tmp_path / "float")
    opened = open_model(tmp_path / "float")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # Python ignores the signal, so writes fail
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            export_compressed(opened, "w8a16", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
