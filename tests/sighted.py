"""A tiny random model that sees, and pictures of noise for it. Its answers mean nothing: it serves tests alone."""

import json
import shutil
from dataclasses import replace

import numpy as np
import torch

from ernie45.engine.request import PlacedPicture
from ernie45.models.released import tiny
from ernie45.models.text import Decoder
from ernie45.models.vision_config import VisionConfig
from ernie45.tokens.patches import patches
from ernie45.tokens.pictures import Picture, PixelRules

RULES = PixelRules(patch=4, image_min=8 * 8, image_max=64 * 64, frame_min=8 * 8, frame_max=32 * 32)
SEEN, START, END, VIDEO_START, VIDEO_END = 500, 501, 502, 503, 504
VISION = VisionConfig(
    depth=2, size=32, num_heads=2, ffn_size=48, patch_size=4, expert_size=24, time_frequencies=6,
    image_id=SEEN, video_id=SEEN, image_start_id=START, image_end_id=END, video_start_id=VIDEO_START, video_end_id=VIDEO_END,
)  # fmt: skip


def sighted_decoder(seed=0, vision=VISION, vocab_size=512):
    """Weights large enough that every part moves the answer."""
    decoder = Decoder(tiny(experts=True, vocab_size=vocab_size), vision)
    decoder.initialise(torch.Generator().manual_seed(seed), std=0.15)
    return decoder.eval()


def noise(rows, columns, seed=0, frames=1):
    """A picture of so many tokens down and across; more frames make a video."""
    size = RULES.factor
    rgb = np.random.default_rng(seed).integers(0, 256, frames * rows * size * columns * size * 3, dtype=np.uint8)
    return Picture("image" if frames == 1 else "video", frames, rows * size, columns * size, rgb.tobytes(), RULES.patch)


def noise_batch(*documents):
    """Documents of ids and pictures of noise as a packed batch for training; every id behind the first is learned."""
    from ernie45.tokens.template import IGNORED
    from ernie45.train.batch import Example, KnownPicture
    from ernie45.train.sighted import Gallery

    gallery, rows = Gallery(RULES, VISION), []
    for parts in documents:
        ids, labels, known = [], [], []
        for part in parts:
            here = [part] if isinstance(part, int) else [START, *[SEEN] * part.tokens, END]
            if not isinstance(part, int):
                gallery._put(part)
                known.append(KnownPicture(None, part.grid, part.digest, "row"))
            labels += [part] if isinstance(part, int) and ids else [IGNORED] * len(here)
            ids += here
        rows.append(Example(tuple(ids), tuple(labels), tuple(known)))
    return gallery.pack(rows)


def placed(*parts):
    """A prompt of token ids and pictures: ids, and the pictures with their places."""
    ids, pictures = [], []
    for part in parts:
        if isinstance(part, Picture):
            ids.append(START if part.kind == "image" else VIDEO_START)
            pictures.append(PlacedPicture(len(ids), part))
            ids += [SEEN] * part.tokens + [END if part.kind == "image" else VIDEO_END]
        else:
            ids.append(part)
    return tuple(ids), tuple(pictures)


@torch.inference_mode()
def expected(decoder, ids, pictures, count):
    """The greedy answer by whole passes without a cache: what every engine must say."""
    from ernie45.nn.attention import PackedCausal

    sight = decoder.sight
    grids = [p.picture.grid for p in pictures]
    places = sight.positions(ids, grids)
    encoded = [sight.encode(torch.from_numpy(patches(p.picture, RULES)), p.picture.grid) for p in pictures]
    tokens, vision_T = list(ids), sight.is_vision(torch.tensor(ids))
    for behind in range(count):
        ids_T = torch.tensor(tokens)
        x_TD = decoder.embed(ids_T)
        for p, features in zip(pictures, encoded, strict=True):
            x_TD[p.start : p.start + len(features)] = features
        later = torch.arange(behind)[:, None].expand(-1, 3) + places.following
        mask = torch.cat((vision_T, torch.zeros(behind, dtype=torch.bool)))
        h_TD = decoder(x_TD, torch.cat((places.positions_T3, later)), PackedCausal([len(tokens)]), mask)
        logits_V = decoder.logits(h_TD[-1:])[0]
        logits_V[sorted(sight.config.placeholder_ids)] = float("-inf")
        tokens.append(int(logits_V.argmax()))
    return tuple(tokens[len(ids) :])


def write_rules(folder, rules=RULES):
    """preprocessor_config.json as the original's processors write it, with bounds small enough for tests."""
    data = {"patch_size": rules.patch, "merge_size": rules.merge, "min_pixels": rules.image_min, "max_pixels": rules.image_max}
    (folder / "preprocessor_config.json").write_text(json.dumps(data))
    video = {"size": {"shortest_edge": rules.frame_min, "longest_edge": rules.frame_max}}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))


CHAT = (
    "{{ '<|begin_of_sentence|>' }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] }}"
    "{% else %}{{ '\\nAssistant: ' + m['content'] + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant: <think>\\n\\n</think>\\n\\n' }}{% endif %}"
)


def sighted_folder(folder):
    """The tiny model as a folder with a tokenizer, a chat template and rules for pictures."""
    from ernie45.models.save import save_model
    from ernie45.tokens.tokenizer import load_tokenizer
    from tests.tokens.conftest import PLACEHOLDERS, TAGS, write_pieces_folder

    words = write_pieces_folder(folder.parent / f"{folder.name}-words", PLACEHOLDERS[:1] + TAGS)
    tokenizer = load_tokenizer(words)
    names = {"image_id": "IMAGE_PLACEHOLDER", "video_id": "IMAGE_PLACEHOLDER", "image_start_id": "IMAGE_START", "image_end_id": "IMAGE_END"}
    names |= {"video_start_id": "VIDEO_START", "video_end_id": "VIDEO_END"}
    vision = replace(VISION, **{field: tokenizer.id_of(f"<|{name}|>") for field, name in names.items()})
    save_model(sighted_decoder(vision=vision, vocab_size=tokenizer.vocab_size), folder)
    for file in words.iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder / file.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    write_rules(folder)
    return folder
