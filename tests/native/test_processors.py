"""No instruction without a question: what the compiler may use for a kind of processor, `cpu.cpp` asks the processor for.

A hypervisor can hide one of them from a guest; then the next kind is taken, and nothing dies of an unknown instruction.
"""

import re
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "kernels"


def test_every_instruction_set_that_is_compiled_for_is_asked_for():
    recipe, questions = (SOURCES / "CMakeLists.txt").read_text(), (SOURCES / "src" / "cpu.cpp").read_text()
    allowed = set(re.findall(r"-m([a-z0-9-]+)(?![a-z0-9=-])", recipe)) - {"arch", "prefer-vector-width", "macro-prefix-map"}
    allowed = {name for name in allowed if name.startswith(("avx", "amx", "fma", "f16c"))}
    assert {"avx2", "avx512bf16", "avx512vbmi", "avxvnni", "amx-tile", "amx-bf16"} <= allowed
    assert allowed == set(re.findall(r'__builtin_cpu_supports\("([^"]+)"\)', questions))
