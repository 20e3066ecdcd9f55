"""Loading holds one copy of the weights, measured from outside in a fresh process.

What is counted: `VmHWM` of /proc/self/status, the most resident memory the process ever had, less what was resident before loading. It
includes pages of the mapped file that the process has touched, although the system can take those back at any time; so it is an upper
bound. The weights have the shape of the 0.3B model with three layers, in bfloat16; two thirds of them are the embedding. What is copied
gives its pages of the file back after each tensor.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ernie45.models.released import CHECKPOINTS
from ernie45.models.save import save_model
from ernie45.models.text import Decoder

MEASURE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from ernie45.models.load import load
def kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
torch.aminmax(torch.ones(1 << 20).bfloat16()); torch.ones(64, 64).mT.contiguous()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, anonymous = kib("VmRSS"), kib("RssAnon")
model = load(sys.argv[1], dtype=sys.argv[2], mapped=sys.argv[3] == "mapped")
print(kib("VmHWM") - before, kib("RssAnon") - anonymous)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    config = replace(CHECKPOINTS["ERNIE-4.5-0.3B"].text, num_layers=3, vocab_size=80_000)
    decoder = Decoder(config).bfloat16()
    for parameter in decoder.parameters():
        parameter.data.fill_(0.5)
    root = tmp_path_factory.mktemp("memory")
    for layout in ("pt", "paddle"):
        save_model(decoder, root / layout, layout=layout)
    return root, sum(parameter.nbytes for parameter in decoder.parameters()), decoder.embed.weight.nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of resident memory")
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "copied"])
@pytest.mark.parametrize(("layout", "dtype", "copies"), [("pt", "bfloat16", 1.0), ("paddle", "bfloat16", 1.0), ("pt", "float32", 2.0)])
def test_the_peak_is_one_copy(folders, layout, dtype, copies, mapped):
    """float32 from bfloat16 doubles the bytes: one float32 copy is two of the file's, and the file's own pages are not held beside it."""
    root, weights, embedding = folders
    command = [sys.executable, "-c", MEASURE, str(root / layout), dtype, "mapped" if mapped else "copied"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, anonymous = (int(word) * 1024 for word in ran.stdout.split())
    largest = embedding if copies > 1 or not mapped else 6144 * 1024 * 2  # while it is copied, one file tensor is there twice
    slack = 24 << 20  # allocator, config, name tables
    assert peak <= copies * weights + largest + slack, f"peak {peak >> 20} MiB for {weights >> 20} MiB of weights"
    if mapped and copies == 1.0:
        assert anonymous <= weights - embedding + slack, "the embedding stays in the file"
