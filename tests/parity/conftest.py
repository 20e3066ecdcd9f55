"""transformers without its progress bars, and one thread: models here are tiny."""

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
