"""Both published forms of a vision-language `config.json`, read and written; anything unknown is refused."""

from dataclasses import replace

import pytest

from ernie45.errors import CheckpointError
from ernie45.models.config import TextConfig
from ernie45.models.released import CHECKPOINTS, RELEASES
from ernie45.models.vision_config import ModelConfig, VisionConfig

SIGHTED = [release for release in RELEASES if release.vision]
# The keys and values of the file published with VL-28B-A3B-PT.
PUBLISHED = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_ernie4_5_vl.Ernie4_5_VLMoEConfig"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5_moe_vl",
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "use_cache": False,
    "vocab_size": 103424,
    "rope_theta": 500000,
    "use_rmsnorm": True,
    "use_bias": False,
    "tie_word_embeddings": True,
    "moe_num_experts": [64, 64],
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_intermediate_size": [1536, 512],
    "moe_capacity": [128, 128, 128],
    "moe_gate": "topk",
    "moe_k": 6,
    "moe_use_aux_free": True,
    "im_patch_id": 100295,
    "pixel_hidden_size": 1280,
    "rope_3d": True,
    "freq_allocation": 20,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "attn_implementation": "eager",
        "attn_sep": True,
        "depth": 32,
        "embed_dim": 1280,
        "hidden_act": "quick_gelu",
        "hidden_size": 1280,
        "in_channels": 3,
        "in_chans": 3,
        "mlp_ratio": 4,
        "model_type": "DFNRope_vision_transformer",
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "vit_first_fwd_bsz": 128,
    },
}
NATIVE = ModelConfig(CHECKPOINTS["ERNIE-4.5-VL-28B-A3B"].text, VisionConfig(expert_size=512, video_id=103_367)).to_hf()


def test_the_published_file_is_the_released_model():
    release = CHECKPOINTS["ERNIE-4.5-VL-28B-A3B"]
    assert ModelConfig.from_hf(PUBLISHED) == ModelConfig(release.text, release.vision)


def test_transformers_defaults_are_the_released_model():
    from transformers import Ernie4_5_VLMoeConfig

    release = CHECKPOINTS["ERNIE-4.5-VL-28B-A3B"]
    assert release.vision is not None
    found = ModelConfig.from_hf(Ernie4_5_VLMoeConfig(text_config={}, vision_config={}).to_dict())
    assert found == ModelConfig(release.text, replace(release.vision, video_id=103_367))


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("release", SIGHTED, ids=lambda release: release.name)
def test_every_release_survives_both_forms(release, original):
    config = ModelConfig(release.text, release.vision)
    assert ModelConfig.from_hf(config.to_hf(original=original)) == config


def test_an_unusual_tower_survives_the_original_form_too():
    vision = VisionConfig(
        depth=1, size=24, num_heads=3, ffn_size=40, patch_size=3, channels=1, merge=3, expert_size=8, rope_theta=50.0, norm_eps=1e-5,
        time_frequencies=2, image_id=1, video_id=2, image_start_id=3, image_end_id=4, video_start_id=5, video_end_id=6,
    )  # fmt: skip
    config = ModelConfig(CHECKPOINTS["ERNIE-4.5-VL-28B-A3B"].text, vision)
    assert ModelConfig.from_hf(config.to_hf(original=True)) == config
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_text_models_pass_through():
    release = CHECKPOINTS["ERNIE-4.5-0.3B"]
    assert ModelConfig.from_hf(release.text.to_hf()) == ModelConfig(release.text)
    assert ModelConfig(release.text).to_hf() == release.text.to_hf()
    with pytest.raises(CheckpointError, match="vision-language"):
        TextConfig.from_hf(PUBLISHED)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"moe_k": None}, "moe_k|num_experts_per_tok"),
        ({"frequency_allocation": 20}, "did you mean 'freq_allocation'|not a setting"),
        ({"rope_3d": False}, "rope_3d is False"),
        ({"moe_use_hard_gate": False}, "moe_use_hard_gate"),
        ({"temporal_conv_size": 4}, "temporal_conv_size is 4"),
        ({"spatial_conv_size": 3}, "spatial_conv_size 3 differs"),
        ({"mm_vocab_size": 512}, "mm_vocab_size"),
        ({"moe_num_experts": [64, 32]}, "both banks must have the same"),
        ({"moe_num_experts": [0, 0]}, "moe_num_experts"),
        ({"moe_layer_start_index": [1, 2]}, "both banks must have the same"),
        ({"moe_intermediate_size": 1536}, "two widths"),
        ({"freq_allocation": 21}, "even number"),
        ({"freq_allocation": 80}, "even number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling"),
        ({"rope_scaling": {"type": "default", "mrope_section": [20, 24, 20]}}, "as many for rows"),
        ({"vision_config": None}, "lacks 'vision_config'"),
        ({"vision_config": {"depth": 0}}, "depth must be at least 1"),
        ({"vision_config": {"num_heads": 7}}, "multiple of 4"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ({"vision_config": {"window_size": 112}}, "'window_size' is not a setting"),
        ({"im_patch_id": "x"}, "image_token_id must be a whole number"),
    ],
)
def test_what_is_not_computed_is_refused(changes, says):
    with pytest.raises(CheckpointError, match=says):
        ModelConfig.from_hf(PUBLISHED | changes)


@pytest.mark.parametrize(
    ("half", "changes", "says"),
    [
        (None, {"audio_config": {}}, "'audio_config' is not a setting"),
        ("text_config", {"sliding": 3}, "'sliding' is not a setting"),
        ("text_config", {"mlp_layer_types": ["dense"]}, "for each of the 28 layers"),
        ("text_config", {"mlp_layer_types": ["sparse", "sparse", "dense", "sparse"] * 7}, "not evenly spaced"),
        ("text_config", {"mlp_layer_types": ["dense"] * 28}, "not evenly spaced"),
        ("vision_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("vision_config", {"temporal_merge_size": 3}, "temporal_merge_size is 3"),
    ],
)
def test_what_is_not_computed_is_refused_in_transformers_form(half, changes, says):
    data = NATIVE | (changes if half is None else {half: NATIVE[half] | changes})
    with pytest.raises(CheckpointError, match=says):
        ModelConfig.from_hf(data)
