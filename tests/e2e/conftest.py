"""Real weights for whole-way tests: the starter folder in the user's cache, and the source file it was made from.

Both are made once and kept, so only the first run on a machine needs a network (or `ERNIE45_STARTER_WHEEL`). They are a hard requirement:
a missing file is an error, never a skip.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from ernie45.config import Environment
from ernie45.models.starter import starter_folder
from ernie45.models.starter_source import GGUF, GGUF_SHA256, sha256_of, starter_source


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Several test runs share two cores; a team of threads that waits for a busy core is slower than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def environment() -> Environment:
    """What the user's own commands see."""
    return Environment.read()


@pytest.fixture(scope="session")
def starter(environment) -> Path:
    """The starter's model folder."""
    return starter_folder(environment, progress=print)


@pytest.fixture(scope="session")
def source_gguf(environment) -> Path:
    """The file the starter was made from."""
    kept = environment.cache_dir / "starter-source" / GGUF
    if not kept.is_file() or sha256_of(kept) != GGUF_SHA256:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=environment.cache_dir) as work:
            partial = Path(work) / "copy"
            shutil.copyfile(starter_source(environment, Path(work), print).gguf, partial)
            partial.replace(kept)
    return kept
