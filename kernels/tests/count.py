"""Count the instructions of the kernels under valgrind and compare with what is on record: a regression shows without a clock.

python kernels/tests/count.py BUILD [--record]        (`make count` builds and runs it)

valgrind knows AVX2 and plain code, not AVX-512, AMX or AVX-VNNI, so only the first two are counted. The record holds for one compiler: with
another the counts are printed and nothing is judged.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

RECORD = Path(__file__).with_name("counts.json")
ISAS = ("avx2", "plain")
MOST = 1.02  # of the recorded count; the counts themselves are exact


def count(program: Path, isa: str, case: str) -> int:
    """Instructions inside the operators; raises CalledProcessError when the kernel cannot run."""
    operators = [f"--toggle-collect=ernie::{name}(*" for name in ("linear", "paged", "rms_norm")]
    tool = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *operators]
    done = subprocess.run([*tool, program, isa, case], capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


def main() -> None:
    """Count everything; end with status 1 when a kernel takes more instructions than on record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    program = args.build / "count"
    cases = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    compiler = (args.build / "compiler.txt").read_text().strip()
    counts = {f"{isa} {case}": count(program, isa, case) for isa in ISAS for case in cases}
    if args.record:
        RECORD.write_text(json.dumps({"compiler": compiler, "counts": counts}, indent=1) + "\n")
    known = json.loads(RECORD.read_text())
    slower = []
    for name, found in counts.items():
        ratio = found / known["counts"][name] if name in known["counts"] else float("inf")
        slower += [name] if ratio > MOST else []
        print(f"{name:24} {found:>12,}  {ratio:.3f} of the record")
    if compiler != known["compiler"]:
        print(f"not judged: the record is of {known['compiler']}, this is {compiler}")
    elif slower:
        sys.exit(f"more instructions than on record: {', '.join(slower)}. If that is meant, run `make count ARGS=--record` and say why.")


if __name__ == "__main__":
    main()
