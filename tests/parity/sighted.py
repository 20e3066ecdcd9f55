"""Tiny random vision-language models of transformers, and prompts for them; weights are large enough that every part moves the logits."""

from dataclasses import dataclass, field

import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

IMAGE, START, END, VIDEO_START, VIDEO_END, VIDEO = 100, 101, 102, 103, 104, 105
_IDS = {
    "image_token_id": IMAGE,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_token_id": VIDEO,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
_TEXT = {"vocab_size": 128, "num_attention_heads": 4, "max_position_embeddings": 4096}
# name -> (text half, vision half, tied); no two have a size in common that could hide a mix-up
CASES = {
    "as 28B: one dense layer, shared experts, tied": (
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": [16, 12],
            "moe_num_shared_experts": 2,
            "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
        },
        {"depth": 2, "hidden_size": 24, "num_heads": 3, "intermediate_size": 40, "patch_size": 4},
        True,
    ),
    "as 424B: three dense layers, none shared, untied": (
        {
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_hidden_layers": 5,
            "num_key_value_heads": 1,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": [12, 20],
            "moe_num_shared_experts": 0,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 2,
            "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2]},
        },
        {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 128, "patch_size": 3, "rms_norm_eps": 1e-5},
        False,
    ),
    "biases, every other layer, blocks of nine, grey pixels": (
        {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 6,
            "num_key_value_heads": 4,
            "head_dim": 20,
            "moe_num_experts": 4,
            "moe_k": 1,
            "moe_intermediate_size": [8, 8],
            "moe_num_shared_experts": 1,
            "use_bias": True,
            "rms_norm_eps": 1e-3,
            "mlp_layer_types": ["dense", "sparse"] * 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 4, 2]},
        },
        {
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 4,
            "intermediate_size": 24,
            "patch_size": 2,
            "in_channels": 1,
            "spatial_merge_size": 3,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 50.0},
        },
        True,
    ),
}


@dataclass
class Prompt:
    """Tokens, the pictures and videos they speak of in order, and the merge size that grids are multiples of."""

    merge: int
    values: int
    tokens: list[int] = field(default_factory=list)
    pixels: list[tuple[torch.Tensor, tuple[int, int, int]]] = field(default_factory=list)

    def text(self, *tokens):
        self.tokens += tokens
        return self

    def image(self, rows, columns):
        return self._seen((1, rows, columns), IMAGE, START, END)

    def video(self, frames, rows, columns):
        return self._seen((frames, rows, columns), VIDEO, VIDEO_START, VIDEO_END)

    def _seen(self, size, token, start, end):
        """`size` counts blocks, so that one prompt serves models with other blocks."""
        t, h, w = size
        grid = (t, h * self.merge, w * self.merge)
        generator = torch.Generator().manual_seed(len(self.tokens))
        self.pixels.append((torch.randn(t * grid[1] * grid[2], self.values, generator=generator), grid))
        self.tokens += [start, *[token] * (max(1, t // 2) * h * w), end]
        return self


PROMPTS = {
    "no image": lambda p: p.text(1, 5, 7, 99, 3, 42, 42, 17),
    "one image": lambda p: p.text(1, 5, 9).image(2, 3).text(7, 8),
    "images of different sizes": lambda p: p.text(1).image(3, 1).text(4).image(1, 4).image(2, 2).text(7, 8, 9),
    "video": lambda p: p.text(1, 2).video(4, 2, 3).text(7, 8),
    "image, video and text": lambda p: p.text(1).video(2, 3, 2).text(4, 4).image(2, 3).text(6).video(6, 3, 3).image(1, 1).text(7),
}


def reference(case):
    """The random transformers model of a case."""
    text, vision, tied = CASES[case]
    torch.manual_seed(list(CASES).index(case))
    config = Ernie4_5_VLMoeConfig(text_config=_TEXT | text, vision_config=vision, tie_word_embeddings=tied, **_IDS)
    model = Ernie4_5_VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "correction_bias" in name:
                parameter.normal_(0, 0.5)  # probabilities are about 1/8: this decides the choice
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    return model.eval()


def prompt(case, name):
    """A named prompt for a case's model."""
    vision = CASES[case][1]
    values = vision.get("in_channels", 3) * vision["patch_size"] ** 2
    return PROMPTS[name](Prompt(vision.get("spatial_merge_size", 2), values))


def their_inputs(found):
    """The prompt as transformers' `forward` wants it."""
    tokens = torch.tensor([found.tokens])
    kinds = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    inputs = {"input_ids": tokens, "mm_token_type_ids": kinds, "moe_mm_token_type_ids": ((tokens >= IMAGE) & (tokens <= VIDEO)).int()}
    for key, grids, chosen in (
        ("pixel_values", "image_grid_thw", [(p, g) for p, g in found.pixels if g[0] == 1]),
        ("pixel_values_videos", "video_grid_thw", [(p, g) for p, g in found.pixels if g[0] > 1]),
    ):
        if chosen:
            inputs[key] = torch.cat([patches for patches, _ in chosen])
            inputs[grids] = torch.tensor([grid for _, grid in chosen])
    return inputs


def their_logits(model, found, **changes):
    """[T, V] float32."""
    model.model.rope_deltas = None  # it is kept between calls
    with torch.inference_mode():
        return model(**their_inputs(found) | changes).logits[0].float()
