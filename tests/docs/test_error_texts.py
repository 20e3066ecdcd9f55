"""The example texts of the errors page are what the code says, word for word."""

import re

import pytest

from ernie45 import errors
from ernie45.config import Environment, from_mapping
from ernie45.engine.request import Request, SamplingParams
from ernie45.engine.scheduler import SchedulerConfig
from ernie45.models.config import TextConfig
from ernie45.train.records import as_record

# Each example of the page, by its first words, and what brings it about.
CAUSES = {
    "engine.page_sise is": lambda: from_mapping(SchedulerConfig, {"page_sise": 16}, "engine"),
    "the environment variable HF_HUB_OFFLINE": lambda: Environment.read({"HF_HUB_OFFLINE": "maybe"}),
    "config.json: model_type 'llama'": lambda: TextConfig.from_hf({"model_type": "llama"}),
    "config.json: 'moe_layer_stride'": lambda: TextConfig.from_hf({"model_type": "ernie4_5_moe", "moe_layer_stride": 2}),
    "max_tokens must be": lambda: SamplingParams(max_tokens=0),
    "prompt holds the token id": lambda: Request(id="a", prompt=(103_424,)).check_vocabulary(103_424),
    "train.jsonl: line 7": lambda: as_record({"src": ["a", "b"], "tgt": ["c"]}, "train.jsonl: line 7"),
    "this needs the package": lambda: raise_missing("huggingface_hub", "hub"),
}


def raise_missing(package, extra):
    raise errors.MissingExtra(package, extra)


@pytest.fixture(scope="module")
def examples(pages):
    """(class, text) of every example on the page; a text may be wrapped there."""
    [page] = [page for page in pages if page.path.name == "errors.md"]
    parts = re.split(r"^## ", page.path.read_text("utf-8"), flags=re.MULTILINE)
    found = [
        (part.split("\n", 1)[0], text) for part in parts for text in re.findall(r"^```text\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    ]
    return [(kind, " ".join(text.split())) for kind, text in found]


def test_every_example_has_its_cause(examples):
    assert len(examples) == len(CAUSES)
    assert all(any(text.startswith(start) for _, text in examples) for start in CAUSES)


@pytest.mark.parametrize("start", CAUSES)
def test_the_code_says_what_the_page_says(examples, start):
    [(kind, text)] = [(kind, text) for kind, text in examples if text.startswith(start)]
    with pytest.raises(getattr(errors, kind)) as caught:
        CAUSES[start]()
    assert " ".join(str(caught.value).split()) == text
