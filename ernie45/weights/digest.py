"""A digest of a model folder that is fast for any size: enough to tell another model from the same one, no proof against an attacker."""

import hashlib
from pathlib import Path

from ernie45.errors import CheckpointError

WHOLE = 64 * 2**20
"""Bytes of a file up to which all of it is read."""
BLOCK, STRIDE = 64 * 2**10, 16 * 2**20
"""Of a larger file this many bytes are read out of every so many, and the last ones: one in 256."""


def digest_of_model(folder: Path) -> str:
    """SHA-256 over `config.json` and the weight files of a folder: names, sizes, and the bytes of each, sampled in files above 64 MiB.

    There the first, the last and every 16 MiB a block of 64 KiB is read. A change that lies wholly between two blocks is not seen; training
    changes whole matrices, which are seldom smaller than that. Raises CheckpointError for a file that cannot be read.
    """
    hashed = hashlib.sha256()
    files = [path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors" or path.name == "config.json"]
    for path in files:
        try:
            size = path.stat().st_size
            hashed.update(repr((path.name, size)).encode())
            with path.open("rb") as file:
                if size <= WHOLE:
                    hashed.update(hashlib.file_digest(file, "sha256").digest())
                    continue
                for start in (*range(0, size - BLOCK, STRIDE), size - BLOCK):
                    file.seek(start)
                    hashed.update(file.read(BLOCK))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return hashed.hexdigest()
