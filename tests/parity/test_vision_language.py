"""Vision-language models against transformers: folders of either side run on the other with equal logits, pictures and videos included.

Tolerance 1e-4 absolute on logits of scale 1 to 10 in float32: the two sum in different orders, each layer adds about one rounding.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Ernie4_5_VLMoeForConditionalGeneration

from ernie45.models.load import load
from ernie45.models.save import save_model
from ernie45.nn.attention import PackedCausal
from ernie45.ops import causal_attention
from tests.parity.sighted import CASES, PROMPTS, Prompt, prompt, reference, their_inputs, their_logits

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A case's name, transformers' model, and ours loaded from the folder it wrote."""
    model, folder = reference(request.param), tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return request.param, model, load(folder, dtype="float32").decoder


def assert_equal_logits(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.5, "logits this small would hide an error"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


class Growing:
    """Attention over everything that passed before, as a cache gives it."""

    def __init__(self):
        self.kept = {}

    def __call__(self, layer, q_TNH, k_TKH, v_TKH):
        if layer in self.kept:
            k_TKH, v_TKH = (torch.cat(pair) for pair in zip(self.kept[layer], (k_TKH, v_TKH), strict=True))
        self.kept[layer] = (k_TKH, v_TKH)
        return causal_attention(q_TNH, k_TKH, v_TKH)


class Prepared:
    """A prompt as the engine prepares it: embedded, placed, and told apart."""

    def __init__(self, decoder, found):
        sight, tokens_T = decoder.sight, torch.tensor(found.tokens)
        places = sight.positions(found.tokens, [grid for _, grid in found.pixels])
        features = [sight.encode(patches, grid) for patches, grid in found.pixels]
        embedding = decoder.embed(tokens_T)
        self.x_TD = sight.put(embedding, tokens_T, torch.cat(features)) if features else embedding
        self.positions_T3, self.following = places
        self.vision_T = sight.is_vision(tokens_T)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits(pair, name):
    case, model, decoder = pair
    found = prompt(case, name)
    assert_equal_logits(decoder.prompt_logits(found.tokens, found.pixels), their_logits(model, found))


def long_video(case):
    start = prompt(case, "no image")
    return Prompt(start.merge, start.values).text(1, 2).video(14, 1, 2).text(5, 6, 7)


def test_behind_a_long_video_either_rule_of_positions(tmp_path):
    case = next(iter(CASES))
    model, found = reference(case), long_video(case)
    model.save_pretrained(tmp_path)
    theirs = their_logits(model, found)
    asked = load(tmp_path, dtype="float32", positions="transformers").decoder
    assert_equal_logits(asked.prompt_logits(found.tokens, found.pixels), theirs)
    original = load(tmp_path, dtype="float32").decoder
    logits = original.prompt_logits(found.tokens, found.pixels)
    assert (logits - theirs).abs().max() > 0.01, "the two rules differ behind such a video"
    places = original.sight.positions(found.tokens, [grid for _, grid in found.pixels])
    assert_equal_logits(logits, their_logits(model, found, position_ids=places.positions_T3.T[:, None]))


@torch.inference_mode()
def test_a_packed_batch_equals_one_by_one(pair):
    case, _, decoder = pair
    prompts = [prompt(case, name) for name in PROMPTS]
    prepared = [Prepared(decoder, found) for found in prompts]
    ends = torch.tensor([len(found.tokens) for found in prompts]).cumsum(0).tolist()
    x, places, vision = (torch.cat([getattr(p, field) for p in prepared]) for field in ("x_TD", "positions_T3", "vision_T"))
    packed = decoder.logits(decoder(x, places, PackedCausal(ends), vision))
    alone = torch.cat([decoder.prompt_logits(found.tokens, found.pixels) for found in prompts])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)  # the same code; rows of a product may be summed in another order


@torch.inference_mode()
def test_pictures_encoded_together_equal_one_by_one(pair):
    case, _, decoder = pair
    pixels = prompt(case, "image, video and text").pixels
    together = decoder.sight.encode(torch.cat([patches for patches, _ in pixels]), *[grid for _, grid in pixels])
    alone = torch.cat([decoder.sight.encode(patches, grid) for patches, grid in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 4, 7])
def test_prefill_in_chunks_that_cut_pictures(pair, size):
    case, model, decoder = pair
    found = prompt(case, "image, video and text")
    p, attend = Prepared(decoder, found), Growing()
    rows = [slice(start, start + size) for start in range(0, len(found.tokens), size)]
    h_TD = torch.cat([decoder(p.x_TD[row], p.positions_T3[row], attend, p.vision_T[row]) for row in rows])
    assert_equal_logits(decoder.logits(h_TD), their_logits(model, found))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["one image", "image, video and text"])
def test_decoding_after_pictures(pair, name):
    case, model, decoder = pair
    found = prompt(case, name)
    model.model.rope_deltas = None
    theirs = model.generate(**their_inputs(found), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=127)
    p, attend, written = Prepared(decoder, found), Growing(), []
    h_TD = decoder(p.x_TD, p.positions_T3, attend, p.vision_T)
    for step in range(6):
        written.append(int(decoder.logits(h_TD[-1:]).argmax()))
        # one position a token is enough again, and every written token is text
        h_TD = decoder(decoder.embed(torch.tensor(written[-1:])), torch.tensor([p.following + step]), attend)
    assert written[: theirs.shape[1] - len(found.tokens)] == theirs[0, len(found.tokens) :].tolist()


@torch.inference_mode()
def test_text_takes_the_text_path(pair):
    """With vision weights that are no numbers a text prompt gives the same logits to the bit, by one position a token and by three."""
    case, _, decoder = pair
    tokens = prompt(case, "no image").tokens
    before = decoder.prompt_logits(tokens)
    kept = {name: p.clone() for name, p in decoder.named_parameters() if ".vision." in name or name.startswith("sight.")}
    assert len(kept) > 20
    for name in kept:
        decoder.get_parameter(name).fill_(float("nan"))
    assert torch.equal(decoder.prompt_logits(tokens), before)
    h_TD = decoder(decoder.embed(torch.tensor(tokens)), torch.arange(len(tokens)), PackedCausal([len(tokens)]))
    assert torch.equal(decoder.logits(h_TD), before)
    decoder.load_state_dict(kept, strict=False)


@pytest.mark.parametrize("layout", ["pt", "fused"])
def test_text_only_leaves_the_rest_in_the_file(tmp_path, layout):
    case = next(iter(CASES))
    model, tokens = reference(case), prompt(case, "no image").tokens
    model.save_pretrained(tmp_path, save_original_format=layout == "pt")
    whole, text = load(tmp_path, dtype="float32"), load(tmp_path, dtype="float32", text_only=True)
    assert text.opened.layout == layout
    assert text.decoder.sight is None
    assert torch.equal(text.decoder.prompt_logits(tokens), whole.decoder.prompt_logits(tokens))
    sizes = [sum(p.numel() * p.element_size() for p in found.decoder.parameters()) for found in (whole, text)]
    (note,) = text.opened.notes
    assert f"{(sizes[0] - sizes[1]) / 2**20:,.1f} MiB" in note


@pytest.mark.parametrize("layout", ["pt", "fused", "paddle"])
def test_our_folder_runs_there_and_here(pair, tmp_path, layout):
    case, _, decoder = pair
    found = prompt(case, "image, video and text")
    logits = decoder.prompt_logits(found.tokens, found.pixels)
    save_model(decoder, tmp_path / "ours", layout=layout, shard_bytes=60_000)
    back = load(tmp_path / "ours", dtype="float32")
    assert back.opened.layout == layout
    assert torch.equal(back.decoder.prompt_logits(found.tokens, found.pixels), logits)
    if layout == "paddle":
        return
    theirs, info = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    theirs.set_experts_implementation("eager")
    assert_equal_logits(logits, their_logits(theirs.eval(), found))


def as_published(pt, paddle):
    """A state that transformers wrote, in the published form, written out plainly; `paddle`: Linears [in, out], columns joined."""
    result = {}
    for name, tensor in pt.items():
        target = name.replace("model.vision_model.", "vision_model.")
        if paddle:
            target = target.replace("model.", "ernie.", 1) if target.startswith("model.") else target
            joined = next((key for key in ("q_proj", "gate_proj") if f".{key}.weight" in name), None)
            if any(f".{key}." in name for key in ("k_proj", "v_proj", "up_proj")):
                continue
            if joined:
                parts, word = (
                    (("q_proj", "k_proj", "v_proj"), "qkv_proj") if joined == "q_proj" else (("gate_proj", "up_proj"), "up_gate_proj")
                )
                tensor = torch.cat([pt[name.replace(joined, part)] for part in parts])
                target = target.replace(joined, word)
            # routers lie transposed in both published forms; everything else with two axes but the embedding is a Linear
            if tensor.dim() == 2 and not any(part in name for part in ("embed_tokens", "mlp.gate.weight", "correction_bias")):
                tensor = tensor.T
        result[target] = tensor.contiguous()
    return result


def published_config(native):
    """The flat form that was published, out of transformers' own."""
    text, tower = native["text_config"], native["vision_config"]
    kinds = text["mlp_layer_types"]
    first = kinds.index("sparse")
    flat = {key: value for key, value in text.items() if key not in ("mlp_layer_types", "rope_parameters", "model_type")}
    return flat | {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_ernie4_5_vl.Ernie4_5_VLMoEConfig"},
        "model_type": "ernie4_5_moe_vl",
        "tie_word_embeddings": native["tie_word_embeddings"],
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "rope_3d": True,
        "freq_allocation": text["rope_parameters"]["mrope_section"][2],
        "moe_num_experts": [text["moe_num_experts"]] * 2,
        "moe_layer_start_index": [first, first],
        "moe_layer_end_index": [len(kinds) + 1, len(kinds)],
        "moe_use_aux_free": True,
        "moe_capacity": [128, 128, 128],
        "moe_gate": "topk",
        "use_rmsnorm": True,
        "pixel_hidden_size": tower["hidden_size"],
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "im_patch_id": native["image_token_id"],
        **{key: native[f"{key}"] for key in native if key.startswith(("image_", "video_")) and key != "image_token_id"},
        "vision_config": {
            "attn_implementation": "eager",
            "attn_sep": True,
            "depth": tower["depth"],
            "embed_dim": tower["hidden_size"],
            "hidden_act": "quick_gelu",
            "hidden_size": tower["hidden_size"],
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": tower["intermediate_size"] / tower["hidden_size"],
            "model_type": "DFNRope_vision_transformer",
            "num_heads": tower["num_heads"],
            "patch_size": tower["patch_size"],
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "vit_first_fwd_bsz": 128,
        },
    }


@pytest.mark.parametrize("paddle", [False, True])
def test_a_folder_in_the_published_form_written_by_hand_runs_here(tmp_path, paddle):
    """A round trip through our own table could hide a wrong order of columns or banks; this cannot."""
    case = next(iter(CASES))
    model, found = reference(case), prompt(case, "image, video and text")
    model.save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = as_published(load_file(path), paddle)
    path.unlink()
    save_file(tensors, path)
    config.write_text(json.dumps(published_config(json.loads(config.read_text()))))
    loaded = load(tmp_path, dtype="float32")
    assert loaded.opened.layout == ("paddle" if paddle else "pt")
    assert_equal_logits(loaded.decoder.prompt_logits(found.tokens, found.pixels), their_logits(model, found))
    text = load(tmp_path, dtype="float32", text_only=True).decoder.prompt_logits([1, 2, 3])
    assert torch.equal(text, loaded.decoder.prompt_logits([1, 2, 3]))


@pytest.mark.parametrize("bank", ["text_moe", "vision_moe"])
def test_the_selection_bias_of_each_bank_decides_in_these_models(bank):
    """Without this, the parity above would not prove that both rows are read."""
    case = next(iter(CASES))
    model, found = reference(case), prompt(case, "one image")
    before = their_logits(model, found)
    for name, parameter in model.named_parameters():
        if "correction_bias" in name and bank in name:
            parameter.data.zero_()
    assert (their_logits(model, found) - before).abs().max() > 0.1
