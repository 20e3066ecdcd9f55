"""Small models and batches that every file here learns with."""

import pytest
import torch

from ernie45.models.released import tiny
from ernie45.models.text import Decoder
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import Example, pack


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Several test runs share two cores; a team of threads that waits for a busy core is slower than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_decoder(config=None, seed=0, std=0.1, **how):
    """A random tiny model; the same seed gives the same weights."""
    return Decoder(config or tiny(**how)).initialise(torch.Generator().manual_seed(seed), std=std)


def make_examples(lengths, seed=0, unlearned=2, vocab=512):
    """Documents of random ids; the first `unlearned` ids of each are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        examples.append(Example(tuple(ids), (IGNORED,) * min(unlearned, length) + tuple(ids[unlearned:])))
    return examples


def make_batch(lengths=(7, 12, 5), seed=0, unlearned=2):
    """Such documents, packed."""
    return pack(make_examples(lengths, seed, unlearned))
