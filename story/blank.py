"""The model before it knows anything: a tokenizer trained on the story's own texts, a shape, and random weights."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.save import save_model
from ernie45.models.text import Decoder
from ernie45.models.vision_config import VisionConfig
from story.scenes import SIDE

VOCABULARY = 4096
SPECIAL = (
    "<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>",
    "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<think>", "</think>",
)  # fmt: skip
NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "unk_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
}
CHAT_TEMPLATE = """\
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = true %}{% endif -%}
{{- '<|begin_of_sentence|>' -}}
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '\\nAssistant: ' + message['content'] + '<|end_of_sentence|>' -}}
    {%- elif message['role'] == 'system' -%}
        {{- message['content'] + '\\n' -}}
    {%- else -%}
        {{- 'User: ' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] -}}
        {%- else -%}
            {%- for part in message['content'] -%}
                {%- if part['type'] == 'text' -%}
                    {{- part['text'] -}}
                {%- else -%}
                    {%- set pictures.count = pictures.count + 1 -%}
                    {{- 'Picture ' ~ pictures.count ~ ':<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>' -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '\\nAssistant: <think>' -}}
    {%- if not (enable_thinking is defined and enable_thinking) %}{{ '\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
"""
"""What ERNIE 4.5 VL's own template writes for texts and images; `load_template` knows it by that."""


def write_blank(folder: Path, texts: Iterable[str], *, small: bool, seed: int = 0) -> dict[str, int]:
    """Write a model folder with random weights and a new tokenizer; returns its numbers of parameters by part.

    small: a shape for a run of seconds. Raises CheckpointError when the folder exists or the disk is full.
    """
    companions = folder.parent / f"{folder.name}-tokenizer"
    tokenizer = train_tokenizer(texts, companions, 1024 if small else VOCABULARY)
    text, vision = shape(tokenizer, small=small)
    decoder = Decoder(text, vision).initialise(torch.Generator().manual_seed(seed), std=0.04)
    save_model(decoder, folder, companions=companions)
    return count_parts(decoder)


def count_parts(decoder: Decoder) -> dict[str, int]:
    """Parameters by what they are for, and those that one text token passes."""
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}

    def total(*words: str) -> int:
        return sum(size for name, size in sizes.items() if all(word in name for word in words))

    sight, seen = total("sight."), total(".ffn.vision.experts.")
    routed = total(".ffn.experts.")
    experts = decoder.config.experts
    assert experts is not None
    active = sum(sizes.values()) - sight - total(".ffn.vision.") - routed + routed * experts.top_k // experts.num_experts
    parts = {"all": sum(sizes.values()), "tower and resampler": sight, "text experts": routed, "vision experts": seen}
    return parts | {"active for a text token": active}


def shape(tokenizer: tokenizers.Tokenizer, *, small: bool) -> tuple[TextConfig, VisionConfig]:
    """The decoder and its eyes: experts of two widths, the vision experts a third of the text experts', as in the large models."""
    ids = {name: tokenizer.token_to_id(f"<|{name.upper()}|>") for name in ("image_start", "image_end", "video_start", "video_end")}
    placeholder = tokenizer.token_to_id("<|IMAGE_PLACEHOLDER|>")
    width, layers, tower, blocks = (96, 3, 96, 2) if small else (128, 4, 128, 3)
    text = TextConfig(
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 32,
        num_kv_heads=max(1, width // 64),
        head_size=32,
        ffn_size=4 * width,
        vocab_size=tokenizer.get_vocab_size(),
        rope_theta=10_000.0,
        max_positions=2048,
        experts=ExpertsConfig(num_experts=8, top_k=2, expert_size=width, num_shared=1, first_layer=1, last_layer=layers - 1),
    )
    vision = VisionConfig(
        depth=blocks,
        size=tower,
        num_heads=tower // 32,
        ffn_size=3 * tower,
        expert_size=width // 3,
        time_frequencies=4,
        image_id=placeholder,
        video_id=placeholder,
        **{f"{name}_id": id for name, id in ids.items()},
    )
    return text, vision


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-level BPE with single digits and ERNIE's special tokens, written with everything that a model folder has beside weights."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    sizes = {"patch_size": 14, "merge_size": 2, "min_pixels": 56 * 56, "max_pixels": SIDE * SIDE}
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {**NAMED, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048},
        "preprocessor_config.json": sizes,
        "video_preprocessor_config.json": {"size": {"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE}},
        "generation_config.json": {"do_sample": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return made
