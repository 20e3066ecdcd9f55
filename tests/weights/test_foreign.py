"""Quantised checkpoints of other programs, packed here number by number as their formats say, and read back."""

import json

import pytest
import torch

from ernie45.errors import CheckpointError
from ernie45.weights.foreign import DecodedFiles
from ernie45.weights.safetensors import open_safetensors
from ernie45.weights.safetensors_write import save_safetensors

OUT, IN, GROUP = 16, 64, 32
NAME = "model.layers.0.mlp.down_proj"


def numbers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(len(shape) + high))


def scales(*shape: int) -> torch.Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(5)) + 0.5).half()


def word(values) -> int:
    """Eight numbers of four bits as one signed word, the first lowest."""
    total = sum(int(value) << (4 * place) for place, value in enumerate(values))
    return total - (1 << 32) if total >= 1 << 31 else total


def packed(rows) -> torch.Tensor:
    """Words along the last axis."""
    return torch.tensor([[word(row[i : i + 8]) for i in range(0, len(row), 8)] for row in rows.tolist()], dtype=torch.int32)


def gptq(shuffled: bool = False, version: str = "gptq"):
    q, z, s = numbers(0, 16, OUT, IN), numbers(1, 16, IN // GROUP, OUT), scales(IN // GROUP, OUT)
    group = torch.arange(IN) // GROUP
    group = group[torch.randperm(IN, generator=torch.Generator().manual_seed(1))] if shuffled else group
    tensors = {"qweight": packed(q).t(), "qzeros": packed(z - int(version == "gptq")), "scales": s, "g_idx": group.int()}
    wanted = torch.empty(OUT, IN)
    for o in range(OUT):
        for i in range(IN):
            wanted[o, i] = (q[o, i] - z[group[i], o]).float() * s[group[i], o].float()
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": version}, tensors, wanted


def awq():
    q, z, s = numbers(0, 16, OUT, IN), numbers(0, 16, IN // GROUP, OUT), scales(IN // GROUP, OUT)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the outputs of a word, lowest bits first
    mixed = [order[j] + 8 * w for w in range(OUT // 8) for j in range(8)]
    tensors = {"qweight": packed(q.t()[:, mixed]), "qzeros": packed(z[:, mixed]), "scales": s}
    wanted = torch.stack([(q[:, i] - z[i // GROUP]).float() * s[i // GROUP].float() for i in range(IN)], dim=1)
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, tensors, wanted


def pack_quantized():
    q, s = numbers(-8, 8, OUT, IN), scales(OUT, IN // GROUP)
    tensors = {"weight_packed": packed(q + 8), "weight_scale": s, "weight_shape": torch.tensor([OUT, IN])}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized"}, tensors, q.float() * s.float().repeat_interleave(GROUP, 1)


def int_quantized():
    q, s = numbers(-128, 128, OUT, IN), scales(OUT, 1)
    tensors = {"weight": q.to(torch.int8), "weight_scale": s}
    return {"quant_method": "compressed-tensors", "format": "int-quantized"}, tensors, q.float() * s.float()


def float_quantized():
    q, s = numbers(-128, 128, OUT, IN).float().to(torch.float8_e4m3fn), scales(1).float()
    return {"quant_method": "compressed-tensors", "format": "float-quantized"}, {"weight": q, "weight_scale": s}, q.float() * s


def block_fp8():
    q, s = numbers(-128, 128, OUT, IN).float().to(torch.float8_e4m3fn), scales(2, 4).float()
    wanted = q.float() * s.repeat_interleave(OUT // 2, 0).repeat_interleave(IN // 4, 1)
    return {"quant_method": "fp8", "weight_block_size": [8, 16]}, {"weight": q, "weight_scale_inv": s}, wanted


def asymmetric(packed_form: bool, order: bool = False):
    """Zero points: packed along O, or int8 as they stand; `order`: inputs in groups of their own choice."""
    q, z, s = numbers(-8, 8, OUT, IN), numbers(-8, 8, OUT, IN // GROUP), scales(OUT, IN // GROUP)
    group = torch.arange(IN) // GROUP
    group = group[torch.randperm(IN, generator=torch.Generator().manual_seed(2))] if order else group
    wanted = (q - z[:, group]).float() * s.float()[:, group]
    tensors = {"weight_scale": s}
    if packed_form:
        tensors |= {"weight_packed": packed(q + 8), "weight_shape": torch.tensor([OUT, IN]), "weight_zero_point": packed((z + 8).t()).t()}
    else:
        tensors |= {"weight": q.to(torch.int8), "weight_zero_point": z.to(torch.int8)}
    if order:
        tensors["weight_g_idx"] = group.int()
    return {"quant_method": "compressed-tensors"}, tensors, wanted


def edge_blocks():
    """Blocks that are cut off at both edges, with the static scale of activations beside them."""
    q, s = numbers(-128, 128, OUT, IN).float().to(torch.float8_e4m3fn), scales(2, 3).float()
    wanted = q.float() * s.repeat_interleave(12, 0)[:OUT].repeat_interleave(24, 1)[:, :IN]
    settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"block_structure": [12, 24]}}}}
    return settings, {"weight": q, "weight_scale": s, "input_scale": torch.ones(1)}, wanted


def opened(folder, settings, tensors) -> DecodedFiles:
    plain = {"model.norm.weight": torch.ones(4), "model.embed_tokens.weight": torch.ones(3, 4)}
    save_safetensors(folder, {**plain, **{f"{NAME}.{part}": value.contiguous() for part, value in tensors.items()}}.items())
    return DecodedFiles(open_safetensors(folder), settings, str(folder))


@pytest.mark.parametrize(
    "made",
    [
        gptq(),
        gptq(shuffled=True),
        gptq(version="gptq_v2"),
        awq(),
        pack_quantized(),
        int_quantized(),
        float_quantized(),
        block_fp8(),
        asymmetric(True),
        asymmetric(True, order=True),
        asymmetric(False),
        edge_blocks(),
    ],
)
def test_every_number_is_what_it_stands_for(tmp_path, made) -> None:
    settings, tensors, wanted = made
    files = opened(tmp_path, settings, tensors)
    assert sorted(files.names()) == [f"model.{name}.weight" for name in ("embed_tokens", "layers.0.mlp.down_proj", "norm")]
    assert files.info(f"{NAME}.weight").shape == (OUT, IN)
    # the products of a whole number and a scale are the same float32 numbers whoever multiplies
    assert torch.equal(files.read(f"{NAME}.weight"), wanted)
    assert torch.equal(files.read("model.norm.weight"), torch.ones(4))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s, t: s.update(quant_method="quip"), "quantised by 'quip', which is not read"),
        (lambda s, t: s.update(bits=3), "3 bits is not read"),
        (lambda s, t: t.update(g_idx=t["g_idx"] + 9), "names group 10 of 2"),
        (lambda s, t: t.update(scales=t["scales"][:, :5]), "do not fit together"),
        (lambda s, t: t.update(qweight=t["qweight"].float()), "not int32"),
        (lambda s, t: t.update(qweight=t["qweight"][0]), "a matrix is expected"),
    ],
)
def test_damaged_and_unknown_ones_are_refused(tmp_path, change, text: str) -> None:
    settings, tensors, _ = gptq()
    change(settings, tensors)
    with pytest.raises(CheckpointError, match=text):
        opened(tmp_path, settings, tensors).read(f"{NAME}.weight")


def test_a_packed_shape_that_lies(tmp_path) -> None:
    settings, tensors, _ = pack_quantized()
    tensors["weight_shape"] = torch.tensor([OUT, 10**9])
    with pytest.raises(CheckpointError, match="says it is 16 x 1000000000"):
        opened(tmp_path, settings, tensors)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s, t: t.update(weight_zero_point=t["weight_zero_point"][:, :1]), r"zero points \[16, 1\] and scales \[16, 2\]"),
        (lambda s, t: t.update(weight_zero_point=t["weight_zero_point"][:1]), "zero points"),
        (lambda s, t: t.update(weight_zero_point=t["weight_zero_point"].float()), "not int32"),
        (lambda s, t: t.update(weight_g_idx=t["weight_g_idx"] - 1), "names group 0 of 2"),
        (lambda s, t: t.update(weight_g_idx=t["weight_g_idx"][:9]), "9 inputs of 64"),
        (lambda s, t: t.update(weight_scale=torch.ones(OUT, IN * 2)), "scales"),
        (lambda s, t: s.update(weight_block_size=[0, 4]), "above 0"),
        (lambda s, t: s.update(weight_block_size="all"), "one pair"),
    ],
)
def test_damaged_zero_points_groups_and_blocks_are_refused(tmp_path, change, text: str) -> None:
    settings, tensors, _ = asymmetric(True, order=True)
    change(settings, tensors)
    with pytest.raises(CheckpointError, match=text):
        opened(tmp_path, settings, tensors).read(f"{NAME}.weight")


def test_parts_of_an_unknown_form_are_refused(tmp_path) -> None:
    settings, tensors, _ = gptq()
    settings["quant_method"] = "fp8"
    with pytest.raises(CheckpointError, match=r"qzeros.*not read"):
        opened(tmp_path, settings, tensors)


def test_a_whole_model_of_another_program_loads(tmp_path) -> None:
    from ernie45.models.config import TextConfig
    from ernie45.models.load import load, load_model
    from ernie45.models.save import save_model
    from ernie45.models.text import Decoder

    config = TextConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_size=16, ffn_size=64, vocab_size=40)
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(0))
    save_model(decoder, tmp_path / "float")
    with open_safetensors(tmp_path / "float") as files:
        tensors = {name: files.read(name).clone() for name in files}
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name)
        step = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / step).round().to(torch.int8)
        tensors[name + "_scale"] = step
    save_safetensors(tmp_path / "theirs", tensors.items())
    body = json.loads((tmp_path / "float" / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}
    }
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(body))
    loaded = load(tmp_path / "theirs")
    assert any("compressed-tensors" in note for note in loaded.opened.notes)
    got, want = (model.prompt_logits([3, 4, 5]) for model in (loaded.decoder, load_model(tmp_path / "float")))
    assert float((got - want).norm() / want.norm()) < 0.02  # steps of 1/127 of a row's largest
