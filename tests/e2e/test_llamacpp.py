"""Exported GGUF files in llama.cpp (through xllamacpp): it must load them and compute what we compute.

Every comparison is against our own decoder reading the same file back, so that only arithmetic differs, and against the original where the
number format is exact.
"""

import json
import math
import urllib.request
from dataclasses import replace

import pytest
import sentencepiece
import torch
import xllamacpp

from ernie45.errors import ErnieError
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.load import load_model
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.recipes.export import ExportConfig, run
from ernie45.tokens.gguf_vocabulary import tokenizer_from_gguf
from ernie45.tokens.tokenizer import load_tokenizer
from ernie45.weights.gguf import open_gguf

DENSE = TextConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,  # not hidden / heads: llama.cpp must take it from the key length
    ffn_size=96,
    vocab_size=320,
    max_positions=256,
)
EXPERTS = replace(
    DENSE,
    num_layers=4,
    experts=ExpertsConfig(num_experts=8, top_k=3, expert_size=32, num_shared=2, first_layer=1, last_layer=3),
)
UNTIED = replace(
    DENSE,
    num_layers=3,
    tie_embeddings=False,
    experts=ExpertsConfig(num_experts=4, top_k=2, expert_size=64, num_shared=0, first_layer=0, last_layer=2),
)
TEXTS = (
    "Once upon a time, there were 1234 models.",
    "  12 34   x=\t42\n\n  def f():\n\treturn 3.14159\n",
    "naïve café, 你好世界, Привет, ١٢٣ ½ ⅷ, é",
    "🙂👩‍👩‍👧 👍🏽 zero\u200bwidth no\u00a0break",
    "it's WE'LL they've  \r\n \n   trailing  ",
    "a\u3000b — “quoted” … (1) [2] {3} #!/usr/bin/env $HOME && ~^",
)


class LlamaCpp:
    """llama.cpp with one model, on one thread, its cache in float32, its own template engine left alone."""

    def __init__(self, path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # its flash attention rounds to float16 inside
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.fit_params, params.verbosity = False, False, -1
        self.server = xllamacpp.Server(params)

    def ask(self, path, body):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def tokenize(self, text, special=False):
        return self.ask("/tokenize", {"content": text, "add_special": False, "parse_special": special})["tokens"]

    def continue_(self, ids, count, top, banned):
        """Greedy tokens, and for each the `top` most likely ids with their natural log probabilities (before `banned` ids are left out)."""
        body = {"prompt": list(ids), "n_predict": count, "temperature": 0, "n_probs": top, "return_tokens": True, "cache_prompt": False}
        reply = self.ask("/completion", body | {"logit_bias": [[id, False] for id in banned]})
        return reply["tokens"], [{p["id"]: p["logprob"] for p in step["top_logprobs"]} for step in reply["completion_probabilities"]]


def worst_difference(llama, decoder, ids, count, top, banned=()):
    """The largest gap in log probability over a greedy continuation, whose tokens must be ours too, up to that gap at near ties.

    llama.cpp reports no probabilities for half a character, so tiny models are kept from choosing one: `banned`.
    """
    tokens, steps = llama.continue_(ids, count, top, banned)
    assert len(tokens) == len(steps) > 0
    worst, ids = 0.0, list(ids)
    for token, theirs in zip(tokens, steps, strict=True):
        ours = decoder.prompt_logits(ids)[-1].double().log_softmax(0)
        assert len(theirs) == top
        worst = max(worst, *(abs(ours[id].item() - logprob) for id, logprob in theirs.items()))
        ours[list(banned)] = -math.inf
        assert ours.max() - ours[token] <= 2 * worst
        ids.append(token)
    return worst


def unprintable(folder, size):
    """Ids that are no ASCII text by themselves."""
    tokenizer = load_tokenizer(folder)
    known = [id for id in range(size) if id in tokenizer.special_ids or not (text := written(tokenizer, id)) or not text.isascii()]
    assert len(known) < size - 50
    return known


def written(tokenizer, id):
    """The text of an id; empty for one that no token has."""
    try:
        return tokenizer.decode([id])
    except ErnieError:
        return ""


def byte_level(folder, size):
    """A vocabulary of the 256 bytes, some merges and two special tokens, as `tokenizer.json`."""
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in letters] + [chr(256 + i) for i in range(256 - len(letters))]
    merges = ["Ġ t", "h e", "Ġt he", "i n", "e r", "Ġ Ġ", "r e", "o n"]
    tokens = ["<pad>", "<s>", "</s>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert len(tokens) < size
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), tokenizer_from_gguf(metadata), strict=True):
        (folder / name).write_text(json.dumps(content))


def pieces(folder, size):
    """A SentencePiece BPE vocabulary of the published kind: byte fallback, no dummy prefix, an added token behind the base pieces."""
    sentences = [" ".join(TEXTS[:1]), "the cat sat on the mat and the other cat sat there too", "one two three four five six seven"] * 4
    (folder / "corpus.txt").write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=True,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<|END|>": 305}))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": ["<|END|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tiny(folder, config, vocabulary):
    """A random model folder. Wide weights, so that attention and routing decide something."""
    torch.manual_seed(5)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            weight.copy_(1 + 0.1 * torch.randn(weight.shape) if name.endswith("norm.weight") else 0.15 * torch.randn(weight.shape))
        for name, weight in decoder.state_dict().items():
            if name.endswith("selection_bias"):
                weight.copy_(0.2 * torch.randn(weight.shape))
    save_model(decoder, folder)
    vocabulary(folder, config.vocab_size)
    return decoder


def exported(folder, environment, kind):
    out = folder.parent / f"{folder.name}.{kind}.gguf"
    assert run(ExportConfig(model=str(folder), out=out, type=kind), environment) == 0
    return out


@pytest.mark.parametrize(
    ("name", "config", "vocabulary"),
    [("dense", DENSE, pieces), ("experts", EXPERTS, byte_level), ("untied", UNTIED, byte_level)],
    ids=["dense", "experts", "untied"],
)
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("f32", 2e-4),  # the same numbers in another order of sums; 5e-6 was seen
        ("f16", 2e-2),  # llama.cpp also rounds activations to float16 before each product: 2^-11 of each, over four layers; 0.004 was seen
        ("q8_0", 2e-1),  # and here to 8-bit blocks: about 2^-8 of each; 0.12 was seen
    ],
)
def test_llama_cpp_computes_what_we_compute(name, config, vocabulary, kind, tolerance, tmp_path, environment):
    """All log probabilities of four steps, over the whole vocabulary."""
    original = tiny(tmp_path / name, config, vocabulary)
    path = exported(tmp_path / name, environment, kind)
    same = load_model(path, dtype="float32")
    if kind == "f32":
        ids = [5, 6, 7]
        assert torch.equal(same.prompt_logits(ids), original.prompt_logits(ids))
    prompt, banned = [11, 45, 200, 13, 99, 7, 150, 31, 64, 90], unprintable(tmp_path / name, config.vocab_size)
    # after one step, rounding may choose another token of nearly the same probability
    steps = 4 if kind == "f32" else 1
    assert worst_difference(LlamaCpp(path), same, prompt, steps, config.vocab_size, banned) < tolerance


@pytest.mark.parametrize("vocabulary", [pieces, byte_level])
def test_llama_cpp_splits_text_as_we_do(vocabulary, tmp_path, environment):
    tiny(tmp_path / "model", DENSE, vocabulary)
    llama, tokenizer = LlamaCpp(exported(tmp_path / "model", environment, "f32")), load_tokenizer(tmp_path / "model")
    for text in TEXTS:
        assert llama.tokenize(text) == tokenizer.encode(text)
    ending = "<|END|>" if vocabulary is pieces else "</s>"
    text = f"the cat{ending} the mat"
    assert llama.tokenize(text, special=True) == tokenizer.encode(text, allow_special=True)


def test_a_four_bit_file_keeps_eight_bits_for_the_logits(tmp_path, environment):
    tiny(tmp_path / "model", EXPERTS, byte_level)
    path = exported(tmp_path / "model", environment, "q4_0")
    with open_gguf(path) as file:
        assert file.type_of("token_embd.weight") == "Q8_0"
        assert file.type_of("blk.1.ffn_gate_exps.weight") == "Q4_0"
        assert file.type_of("blk.1.ffn_gate_inp.weight") == file.type_of("blk.1.exp_probs_b.bias") == "F32"
    # Four-bit codes times eight-bit activations, against our float32 products of the same codes; wrong nibbles or scales give differences
    # of several units.
    assert worst_difference(LlamaCpp(path), load_model(path, dtype="float32"), [5, 6, 7, 8], 1, EXPERTS.vocab_size) < 1.0


def test_the_starter_in_llama_cpp(starter, environment, tmp_path):
    """Ids on a varied corpus, special tokens, greedy text and the twenty best log probabilities of each step, stored as float16."""
    path = tmp_path / "starter.gguf"
    assert run(ExportConfig(model=str(starter), out=path, type="f16"), environment) == 0
    llama, tokenizer = LlamaCpp(path), load_tokenizer(starter)
    for text in TEXTS:
        assert llama.tokenize(text) == tokenizer.encode(text)
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(chat, allow_special=True)
    assert llama.tokenize(chat, special=True) == ids
    # float16 activations over 30 layers; 0.016 was seen
    assert worst_difference(llama, load_model(path, dtype="float32"), ids, 8, 20) < 0.05
    with open_gguf(path) as file:
        assert "no ERNIE weights" in file.metadata["general.description"]
        assert math.isclose(file.metadata["ernie4_5.rope.freq_base"], 1e5)
