"""A file may be larger than the machine's memory: it is mapped, not held."""

import json
import struct

from ernie45.weights.safetensors import open_safetensors


def test_a_file_larger_than_memory_opens_and_reads(tmp_path):
    size = 1 << 40
    header = json.dumps({"far": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:  # sparse: it takes no room on the disk
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
        file.seek(-1, 2)
        file.write(b"\x07")
    with open_safetensors(path) as files:
        far = files.read("far")
        assert far.shape == (size,)
        assert far[-1] == 7
        far[0] = 5  # our copy alone
        assert far[0] == 5
    with path.open("rb") as file:
        file.seek(8 + len(header))
        assert file.read(1) == b"\0", "the file must stay as it is"
