"""The door is cheap: importing the package and asking for help load no torch."""

import json
import subprocess
import sys

import pytest

IMPORT_SECONDS = 0.1
HEAVY = {"torch", "numpy", "tokenizers", "transformers", "rich"}

IMPORT = """
import json, sys, time
start = time.process_time()
import ernie45
print(json.dumps({"seconds": time.process_time() - start, "modules": sorted({m.split(".")[0] for m in sys.modules})}))
"""

COMMAND = """
import json, sys
from ernie45.cli import main
try:
    main(%r)
except SystemExit as end:
    code = end.code
else:
    code = 0
print(json.dumps({"code": code, "modules": sorted({m.split(".")[0] for m in sys.modules})}))
"""


def run(program):
    """Run a program in an interpreter of its own; its last line is the answer."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy():
    assert not HEAVY & set(run(IMPORT)["modules"])


def test_importing_the_package_is_quick():
    # The best of several: the others tell how busy the machine is.
    assert min(run(IMPORT)["seconds"] for _ in range(5)) < IMPORT_SECONDS


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["models", "--help"]], ids=" ".join)
def test_asking_for_help_loads_no_torch(arguments):
    answer = run(COMMAND % (arguments,))
    assert answer["code"] in (0, None)
    assert "torch" not in answer["modules"]


def test_public_names_exist_and_unknown_ones_do_not():
    import ernie45

    assert all(getattr(ernie45, name) is not None for name in ernie45.__all__)
    assert set(ernie45.__all__) == set(dir(ernie45))
    with pytest.raises(AttributeError, match="no_such_name"):
        ernie45.no_such_name  # noqa: B018
