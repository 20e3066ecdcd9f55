"""Schemes and rules: words that are read, rules that are total, patterns that must fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.errors import ConfigError
from ernie45.ops.codes import CODES, coded_shapes
from ernie45.quant.spec import GROUPS, QuantSpec, Rule, Scheme


@given(bits=st.sampled_from([4, 8]), group=st.sampled_from(GROUPS), hadamard=st.booleans(), act_bits=st.sampled_from([8, 16]))
def test_schemes_are_written_as_they_are_read(bits, group, hadamard, act_bits):
    scheme = Scheme(bits, group, hadamard, act_bits)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("code", CODES)
def test_codes_are_written_as_they_are_read(code):
    for word in (code, f"{code}-h"):
        scheme = Scheme.parse(word)
        assert str(scheme) == word
        assert (scheme.code, scheme.hadamard, scheme.group) == (code, word.endswith("-h"), 64)
    values, scales = coded_shapes(code, 1, 1024)
    assert Scheme.parse(code).bits_per_weight(1024) == (8 * values[1] + 16 * scales[1]) / 1024


@pytest.mark.parametrize(
    "word", ["", "ccq2.07", "ccq2.06-g64", "w4", "w5a8", "w4a32", "w4a8-g0", "w4a8-g48", "w4a8-64", "W4A8", "w4a8-g64 "]
)
def test_other_words_are_refused(word):
    with pytest.raises(ConfigError, match="scheme"):
        Scheme.parse(word)


def test_the_first_rule_that_fits_decides():
    spec = QuantSpec.uniform("w4a8-g64", head="w8a8-g128")
    assert spec.scheme_for("head") == spec.scheme_for("embed") == Scheme(8, 128)
    assert spec.scheme_for("layers.0.attn.qkv") == Scheme(4, 64)
    whole = QuantSpec(rules=(Rule(pattern="mtp.*", scheme=None), *spec.rules))
    assert whole.scheme_for("mtp.project") is None


def test_a_spec_passes_through_plain_data():
    spec = QuantSpec(rules=(Rule(pattern="head", scheme=None), Rule(pattern="*", scheme="w8a8")))
    assert QuantSpec.from_dict(spec.to_dict(), "quantization") == spec
    with pytest.raises(ConfigError, match="sceme"):
        QuantSpec.from_dict({"rules": [{"pattern": "*", "sceme": "w8a8"}]}, "quantization")


def test_rules_are_total_and_fit_something():
    spec = QuantSpec(rules=(Rule(pattern="layers.*", scheme="w4a8"),))
    with pytest.raises(ConfigError, match="head"):
        spec.scheme_for("head")
    with pytest.raises(ConfigError, match=r"layrs\.\*"):
        QuantSpec(rules=(Rule(pattern="layrs.*", scheme=None), *spec.rules)).check(["layers.0.attn.qkv"])


def test_bits_count_the_scales():
    assert Scheme(4, 64).bits_per_weight(1024) == 4.25
    assert Scheme(8, 0).bits_per_weight(1024) == 8 + 16 / 1024


@pytest.mark.parametrize(
    ("schemes", "rounds"),
    [(("w4a8-g64", "w8a8"), True), (("w4a8", "w8a16"), False), (("fp8-block",), False), (("w8a8", None), True), ((None,), False)],
)
def test_whether_all_activations_are_rounded(schemes, rounds):
    spec = QuantSpec(rules=tuple(Rule(pattern=f"part{i}", scheme=scheme) for i, scheme in enumerate(schemes)))
    assert spec.rounds_activations is rounds
