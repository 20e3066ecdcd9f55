"""The starter's tokenizer and chat template against transformers and plain Jinja, both reading the source GGUF file.

transformers (5.23) drops the splitting of single digits when it reads this tokenizer out of GGUF, so its ids differ from the original's
where whitespace of more than one character, or a digit outside ASCII, meets a number. Those texts are compared with llama.cpp, which has it
(`test_llamacpp`).
"""

import warnings

import jinja2
import pytest
from transformers import AutoTokenizer

from ernie45.tokens.template import load_template
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.weights.gguf import open_gguf

TEXTS = (
    "",
    " ",
    "Once upon a time, there were 1234 models; in 2024 they numbered 5,678.",
    "def f(x):\n\treturn [y for y in x if y != 'a']\n\n\n    # done   \n",
    "naïve café, 你好世界, Привет мир, שלום, नमस्ते, こんにちは",
    "🙂👩‍👩‍👧 👍🏽 zero\u200bwidth no\u00a0break \u3000 wide",
    "it's WE'LL they've I'm  \r\n \n   trailing  ",
    "“quoted” — dash … #!/usr/bin/env $HOME && ~^ <div class='x'>&amp;</div>",
    "e\u0301 against é, ﬁ against fi, \x00 \x7f control",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><file_sep>",
    "a" * 500,
)
CHATS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  two\n\nlines  "}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "2 <b>&amp;</b>"}],
)


@pytest.fixture(scope="module")
def ours(starter):
    return load_tokenizer(starter)


@pytest.fixture(scope="module")
def theirs(source_gguf):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(source_gguf.parent, gguf_file=source_gguf.name)


def test_ids_are_those_of_transformers(ours, theirs):
    for text in TEXTS:
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"], text


def test_ids_give_the_text_back(ours):
    for text in TEXTS:
        assert ours.decode(ours.encode(text, allow_special=True), skip_special=False) == text


def test_the_folder_reads_the_same_in_transformers(ours, starter):
    """With the digits too: from the folder it takes the whole pre-tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(starter)
    for text in (*TEXTS, "  12 34   x=\t42 ½ ١٢٣"):
        assert ours.encode(text, allow_special=True) == tokenizer(text)["input_ids"], text


def test_special_tokens_are_the_source_models(ours, theirs):
    assert ours.special_ids == frozenset(range(17))
    assert ours.eos_ids == (theirs.eos_token_id,) == (2,)
    assert [ours.token_of(id) for id in range(17)] == theirs.convert_ids_to_tokens(range(17))


@pytest.mark.parametrize("generate", [True, False])
def test_prompts_are_what_the_source_template_writes(generate, ours, starter, source_gguf):
    with open_gguf(source_gguf) as file:
        template = jinja2.Environment().from_string(file.metadata["tokenizer.chat_template"])
    renderer = load_template(starter, ours)
    for chat in CHATS:
        expected = template.render(messages=chat, add_generation_prompt=generate)
        prompt = renderer.render(chat, add_generation_prompt=generate)
        assert prompt.text == expected
        assert list(prompt.ids) == ours.encode(expected, allow_special=True)
