"""Kernels that do not belong to this code: said once with what to do, and everything runs without them."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernie45 import ops
from ernie45.errors import ConfigError
from ernie45.ops import native

# Every operator the code calls, as the library of this interface declares it. Does this fail after a change of an operator? Raise
# kInterface in kernels/src/tensors.h and INTERFACE in ernie45/ops/native.py, then change it here.
DECLARED = {
    5: {
        "adamw": "(Tensor(a!) weight, Tensor(b!)? low, Tensor gradient, Tensor(c!) mean, Tensor(d!) square, float scale, float mean_share, "
        "float square_rest, float rate, float root_scale, float eps, float decay, int step, str isa) -> ()",
        "add_matmul": "(Tensor(a!) sums, Tensor left, Tensor right, str isa) -> ()",
        "available": "() -> str",
        "bf16_linear": "(Tensor x, Tensor weight, str isa) -> Tensor",
        "feed_forward": "(Tensor x, Tensor? norm, float eps, Tensor gate_up, Tensor gate_up_scale, int gate_up_bits, Tensor down, "
        "Tensor down_scale, int down_bits, int inner, str isa) -> Tensor",
        "interface_number": "() -> int",
        "linear": "(Tensor x, Tensor? norm, float eps, Tensor packed, Tensor scale, int bits, int out_size, Tensor? addend, "
        "str isa) -> Tensor",
        "matmul": "(Tensor left, Tensor right, bool wide, str isa) -> Tensor",
        "network": "(Tensor norm, float eps, int layers, int vocabulary, int heads, int kv_heads, int head_size) -> Tensor",
        "paged_attention": "(Tensor q, Tensor keys, Tensor values, Tensor pages, Tensor lengths, int page_size, str isa) -> Tensor",
        "qkv": "(Tensor x, Tensor? norm, float eps, Tensor packed, Tensor scale, int bits, Tensor turns, int heads, int kv_heads, "
        "int head_size, str isa) -> (Tensor, Tensor, Tensor)",
        "rms_norm": "(Tensor x, Tensor weight, float eps, str isa) -> Tensor",
        "rotate": "(Tensor x, Tensor turns, str isa) -> Tensor",
        "set_attention": "(Tensor(a!) network, int layer, Tensor norm, Tensor qkv, Tensor? qkv_scale, int qkv_bits, Tensor out, "
        "Tensor? out_scale, int out_bits) -> ()",
        "set_embedding": "(Tensor(a!) network, Tensor values, Tensor? scales, int bits) -> ()",
        "set_experts": "(Tensor(a!) network, int layer, Tensor norm, Tensor router, Tensor bias, Tensor gate_up, Tensor? gate_up_scale, "
        "Tensor down, Tensor? down_scale, int bits, int inner, int top_k, float norm_min, Tensor(b!)? counts=None) -> ()",
        "set_feed_forward": "(Tensor(a!) network, int layer, Tensor norm, Tensor gate_up, Tensor? gate_up_scale, int gate_up_bits, "
        "Tensor down, Tensor? down_scale, int down_bits, int inner) -> ()",
        "set_head": "(Tensor(a!) network, Tensor values, Tensor? scales, int bits) -> ()",
        "swiglu": "(Tensor x, str isa) -> Tensor",
        "sketch_head": "(Tensor(a!) network) -> Tensor",
        "step": "(Tensor network, Tensor tokens, Tensor turns, Tensor slots, Tensor(a!) cache, Tensor spans, Tensor pages, int page_size, "
        "Tensor answers, bool only_best, str isa) -> (Tensor, Tensor, Tensor, Tensor)",
        "tower_heads": "(Tensor x, Tensor norm, Tensor norm_bias, float eps, Tensor qkv, Tensor? qkv_scale, Tensor qkv_bias, Tensor turns, "
        "int heads, int size, int first, Tensor(a!) space, str isa) -> ()",
        "tower_rest": "(Tensor x, Tensor space, int heads, int size, int first, Tensor out, Tensor? out_scale, Tensor out_bias, "
        "Tensor norm, Tensor norm_bias, float eps, Tensor up, Tensor? up_scale, Tensor up_bias, Tensor down, Tensor? down_scale, "
        "Tensor down_bias, str isa) -> Tensor",
    }
}


@pytest.mark.native
def test_a_changed_operator_has_a_new_number(kernels):
    found = {s.name.removeprefix("ernie45::"): str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("ernie45::")}
    assert found == {name: f"ernie45::{name}{words}" for name, words in DECLARED[native.INTERFACE].items()}
    assert torch.ops.ernie45.interface_number() == native.INTERFACE


@pytest.mark.native
@pytest.mark.parametrize(("number", "age"), [(native.INTERFACE + 1, "older"), (native.INTERFACE - 1, "newer")])
def test_kernels_of_another_version_stand_aside(kernels, monkeypatch, caplog, number, age):
    monkeypatch.setattr(native, "INTERFACE", number)
    with caplog.at_level(logging.WARNING):
        assert native.load(None, native.find_library()) is None
    (record,) = caplog.records
    assert f"{age} than this ernie45" in record.getMessage()
    assert "run: make kernels" in record.getMessage()
    with pytest.raises(ConfigError, match=f"{age} than this ernie45"):
        native.load("plain", native.find_library())


def test_a_broken_library_stands_aside(tmp_path, caplog):
    library = tmp_path / "kernels.so"
    library.write_bytes(b"\x7fELF and no more")
    with caplog.at_level(logging.WARNING):
        assert native.load(None, library) is None
    assert "do not load" in caplog.text
    assert "make kernels" in caplog.text
    with pytest.raises(ConfigError, match="do not load"):
        native.load("plain", library)


def test_a_library_from_before_the_numbers_is_reported_once_and_replaced_by_torch(tmp_path):
    """In a process of its own, as a user meets it: a library without `interface_number` in place of the kernels."""
    package = tmp_path / "ernie45_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "kernels.so").symlink_to(Path(torch.__file__).parent / "lib" / "libc10.so")
    script = "import ernie45, ernie45.ops as ops; print(ops.KERNELS, ops.describe())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": f"{tmp_path}:{Path(ops.__file__).parents[2]}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith("None plain PyTorch, 1 thread (the installed native kernels are older")
    assert done.stderr.count("run: make kernels") == 1
    assert "Traceback" not in done.stderr
