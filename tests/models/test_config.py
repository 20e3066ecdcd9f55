"""Reading `config.json`: the published files are understood, everything else is answered."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import CheckpointError
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.released import CHECKPOINTS, RELEASES, tiny

PUBLISHED_SMALL = {
    "architectures": ["Ernie4_5_ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_ernie4_5.Ernie4_5_Config"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 18,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "use_cache": False,
    "vocab_size": 103424,
    "rope_theta": 500000,
    "use_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def test_the_published_small_config_is_read():
    assert TextConfig.from_hf(PUBLISHED_SMALL) == CHECKPOINTS["ERNIE-4.5-0.3B"].text


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_every_release_survives_the_round_trip(release):
    assert TextConfig.from_hf(release.text.to_hf()) == release.text


def test_an_end_index_of_minus_one_or_past_the_end_means_the_last_layer():
    data = CHECKPOINTS["ERNIE-4.5-21B-A3B"].text.to_hf()
    for end in (-1, 27, 29, None):
        config = TextConfig.from_hf({**data, "moe_layer_end_index": end})
        assert config.experts is not None
        assert config.experts.last_layer == 27


@given(first=st.integers(0, 9), last=st.integers(0, 9), interval=st.integers(1, 4))
def test_expert_layers_follow_the_rule(first, last, interval):
    bank = ExpertsConfig(num_experts=4, top_k=2, expert_size=8, num_shared=0, first_layer=first, last_layer=last, interval=interval)
    config = replace(tiny(), num_layers=10, experts=bank)
    got = [i for i in range(10) if config.is_expert_layer(i)]
    assert got == [i for i in range(first, last + 1) if (i + 1) % interval == 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ["llama", "ernie4_5_moe"]),
        ({"model_type": "ernie4_5_moe_vl"}, ["vision-language"]),
        ({"model_type": None}, ["None", "ernie4_5"]),
        ({"hiden_size": 4}, ["hiden_size", "hidden_size"]),
        ({"moe_flux_capacitor": 1}, ["moe_flux_capacitor"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling"]),
        ({"compression_ratio": 2.0}, ["compression_ratio"]),
        ({"quantization_config": {"bits": 4}}, ["quantised"]),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, ["3", "2", "multiple"]),
        ({"head_dim": 127}, ["127", "even"]),
        ({"hidden_size": "1024"}, ["hidden_size", "whole number"]),
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_nextn_predict_layers": 2}, ["num_mtp", "2"]),
        ({"rope_theta": None}, ["rope_theta"]),
        ({"moe_num_experts": 4, "moe_k": 5, "moe_intermediate_size": 8}, ["top_k", "5", "4"]),
    ],
)
def test_a_bad_config_is_answered(change, words):
    with pytest.raises(CheckpointError) as error:
        TextConfig.from_hf({**PUBLISHED_SMALL, **change}, "folder/config.json")
    for word in words:
        assert word in str(error.value)


def test_a_missing_size_is_named():
    data = {k: v for k, v in PUBLISHED_SMALL.items() if k != "vocab_size"}
    with pytest.raises(CheckpointError, match="vocab_size"):
        TextConfig.from_hf(data)


def test_experts_type_without_experts_is_refused():
    with pytest.raises(CheckpointError, match="moe_num_experts"):
        TextConfig.from_hf({**PUBLISHED_SMALL, "model_type": "ernie4_5_moe"})
