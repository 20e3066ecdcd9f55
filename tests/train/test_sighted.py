"""Batches with pictures: each row with its own, read again when they are needed, refused when they have changed."""

from dataclasses import replace

import pytest
import torch

from ernie45.errors import ConfigError, DataError
from ernie45.plan.flops import causal_pairs
from ernie45.tokens.messages import Image, Message, Text
from ernie45.tokens.patches import patches
from ernie45.tokens.template import IGNORED
from ernie45.train.batch import Example, pack
from ernie45.train.evaluate import HeldOut
from ernie45.train.examples import PackedExamples, digest_of
from ernie45.train.optim import Optimiser, OptimiserConfig
from ernie45.train.preference import PairExample, pack_pairs, pair_log_probs
from ernie45.train.sighted import Gallery, PictureConfig
from ernie45.train.step import LossConfig, Step
from ernie45.train.unpaired import JudgedExample, pack_judged
from tests.parallel.facts import Keep
from tests.sighted import END, RULES, SEEN, START, VISION, sighted_decoder

SMALL = PictureConfig(max_pixels=32 * 32)


@pytest.fixture
def files(photo, tmp_path):
    """Three photographs as files, by name."""
    names = {"cat": "chelsea.png", "cup": "coffee.png", "rocket": "rocket.jpg"}
    for name, source in names.items():
        (tmp_path / name).write_bytes(photo(source))
    return {name: tmp_path / name for name in names}


@pytest.fixture
def gallery():
    return Gallery(RULES, VISION, SMALL)


def example(gallery, *parts):
    """Ids and paths as one document; every id but the first is learned."""
    ids, labels, media = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            labels.append(part if len(ids) > 1 else -100)
        else:
            (measured,), known = gallery.look([Message("user", (Image(source=str(part)), Text("?")))], "rows: line 1")
            media += known
            here = [START, *[SEEN] * measured.media[0].tokens, END]
            ids += here
            labels += [-100] * len(here)
    return Example(tuple(ids), tuple(labels), tuple(media))


def learn(decoder, batches, **how):
    """Report and gradients of one step."""
    optimiser = Keep(decoder, OptimiserConfig(), 32)
    step = Step(decoder, optimiser, LossConfig(**how))
    report = step(batches, 0, 1e-3)
    step.watch.close()
    return report, optimiser.grads


def test_a_batch_holds_the_pictures_of_its_rows_in_order(gallery, files):
    rows = [example(gallery, 5, files["cup"], 7), example(gallery, 8, 9), example(gallery, 3, files["cat"], 4, files["rocket"], 6)]
    batch = gallery.pack(rows)
    wanted = [gallery.picture(one) for row in rows for one in row.pictures]
    assert batch.seen.grids == tuple(picture.grid for picture in wanted)
    assert torch.equal(batch.seen.patches_SC, torch.cat([torch.from_numpy(patches(picture, RULES)) for picture in wanted]))
    assert torch.equal(batch.seen.vision_T, torch.isin(batch.tokens_T, torch.tensor([SEEN, START, END])))
    assert batch.positions_T.shape == (batch.num_tokens, 3)
    starts = [0, *batch.doc_ends[:-1]]
    assert batch.positions_T[starts].tolist() == [[0, 0, 0]] * 3, "positions begin anew in every document"
    _, rows_seen, columns = (size // 2 for size in wanted[0].grid)
    seen = batch.positions_T[2 : 2 + rows_seen * columns]
    assert seen.tolist() == [[2, 2 + r, 2 + c] for r in range(rows_seen) for c in range(columns)]
    assert batch.beside_pictures == 1 + 2


def test_rows_packed_together_learn_as_one_by_one(gallery, files):
    """No row sees another's picture: loss and gradients are those of the rows each in a batch of its own."""
    decoder = sighted_decoder()
    rows = [example(gallery, 5, files["cup"], 7, 9), example(gallery, 8, 9, 3, 3), example(gallery, 3, files["cat"], 4, files["rocket"], 6)]
    together, grads = learn(decoder, [gallery.pack(rows)])
    apart, same = learn(decoder, [gallery.pack([row]) for row in rows])
    assert together.loss == pytest.approx(apart.loss, abs=1e-6)
    assert grads.keys() == same.keys()
    for name in grads:
        # float32, other products: rows of one matrix are summed in another order
        torch.testing.assert_close(grads[name], same[name], atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    other = replace(rows[0], pictures=rows[2].pictures[:1])
    if other.pictures[0].grid == rows[0].pictures[0].grid:
        assert learn(decoder, [gallery.pack([other, *rows[1:]])])[0].loss != together.loss


def test_loss_by_what_stands_beside(gallery, files):
    decoder = sighted_decoder()
    seen, text = example(gallery, 5, files["cup"], 7, 9), example(gallery, 8, 9, 3, 3)
    both, _ = learn(decoder, [gallery.pack([seen, text])])
    assert both.vision_loss == pytest.approx(learn(decoder, [gallery.pack([seen])])[0].loss, abs=1e-5)
    assert both.text_loss == pytest.approx(learn(decoder, [pack([text])])[0].loss, abs=1e-5)
    assert both.vision_tokens == int(gallery.pack([seen]).seen.vision_T.sum())
    assert HeldOut(decoder, [gallery.pack([seen]), pack([text])])().loss == pytest.approx(both.loss, abs=1e-5)


def test_the_digest_of_a_batch_knows_its_pixels(gallery, files, photo):
    row = example(gallery, 5, files["cup"], 7)
    turned = replace(row, pictures=(replace(row.pictures[0], digest=bytes(32)),))
    assert digest_of(gallery.pack([row])) == digest_of(gallery.pack([row]))
    known = gallery.picture(row.pictures[0])
    gallery._shelf[bytes(32)] = replace(known, rgb=bytes(len(known.rgb)))
    assert digest_of(gallery.pack([turned])) != digest_of(gallery.pack([row]))


def test_pictures_are_read_again_and_must_be_the_same(files):
    gallery = Gallery(RULES, VISION, SMALL, shelf_mb=0)
    row = example(gallery, 5, files["cup"], 7)
    assert not gallery._shelf, "nothing is kept"
    data = PackedExamples([row], 512, 0, gallery.pack)
    assert torch.equal(data.batch(0).seen.patches_SC, data.batch(3).seen.patches_SC)
    files["cup"].write_bytes(files["rocket"].read_bytes())
    with pytest.raises(DataError, match=r"rows: line 1: .*cup is another picture than when the data was read"):
        data.batch(0)
    files["cup"].unlink()
    with pytest.raises(DataError, match="rows: line 1: a picture that could be read before cannot be read now"):
        data.batch(0)


def test_the_shelf_keeps_what_was_used_last(files):
    gallery = Gallery(RULES, VISION, PictureConfig(max_pixels=64 * 64), shelf_mb=1)
    gallery._room = 2 * 64 * 64 * 3
    rows = [example(gallery, 5, files[name], 7) for name in ("cat", "cup", "rocket")]
    assert len(gallery._shelf) == 2
    gallery.pack(rows)
    assert gallery._held == sum(len(picture.rgb) for picture in gallery._shelf.values()) <= gallery._room
    assert next(reversed(gallery._shelf)) == rows[2].pictures[0].digest


def test_what_cannot_be_read_is_named(gallery, tmp_path):
    (tmp_path / "no.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    look = lambda source: gallery.look([Message("user", (Text("a"), Image(source=source)))], "rows: line 4")  # noqa: E731
    with pytest.raises(DataError, match=r"rows: line 4: messages\[0\].content\[1\]: .*missing.png cannot be read: No such file"):
        look(str(tmp_path / "missing.png"))
    with pytest.raises(DataError, match=r"rows: line 4: messages\[0\].content\[1\]: .*no.png: this is no image of a known format"):
        look(str(tmp_path / "no.png"))
    with pytest.raises(DataError, match="not fetched here"):
        look("https://example.org/a.png")
    with pytest.raises(DataError, match="more than 2 images"):
        Gallery(RULES, VISION, PictureConfig(most=2)).look([Message("user", (Image(source="a"),) * 3)], "rows: line 4")


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"pictures\.max_pixels must be at least 1, not 0"):
        PictureConfig(max_pixels=0)
    with pytest.raises(ConfigError, match=r"pictures\.min_pixels is 9, more than pictures\.max_pixels, 4"):
        PictureConfig(min_pixels=9, max_pixels=4)
    with pytest.raises(ConfigError, match=r"pictures\.fps must be a number above 0"):
        PictureConfig(fps=float("nan"))
    assert PictureConfig(max_pixels=1024).rules(RULES) == replace(RULES, image_max=1024)


def test_a_video_is_learned_from(clip, tmp_path):
    (tmp_path / "bikes.mp4").write_bytes(clip("bikes.mp4"))
    from ernie45.tokens.messages import Video

    gallery = Gallery(RULES, VISION, PictureConfig(max_frames=4, min_frames=4, video_max_pixels=16 * 16))
    (measured,), known = gallery.look([Message("user", (Video(source=str(tmp_path / "bikes.mp4")),))], "rows: line 1")
    tokens = measured.media[0].tokens
    ids = (5, VISION.video_start_id, *[SEEN] * tokens, VISION.video_end_id, 7, 8)
    batch = gallery.pack([Example(ids, (*[-100] * (tokens + 3), 7, 8), known)])
    assert batch.seen.grids[0][0] == 4
    assert batch.positions_T[:, 0].max() > 2, "pairs of frames stand one behind the other in time"
    report, grads = learn(sighted_decoder(), [batch])
    assert report.vision_loss == report.loss
    assert all(grads[name].abs().max() > 0 for name in ("sight.tower.patches.weight", "sight.resampler.temporal.first.weight"))


def test_a_predictor_in_a_model_that_sees_is_refused():
    from ernie45.models.released import tiny
    from ernie45.models.text import Decoder

    decoder = Decoder(tiny(experts=True, num_mtp=1), VISION).initialise(torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"set losses\.mtp 0"):
        Step(decoder, Optimiser(decoder, OptimiserConfig(), 32), LossConfig())


def pair_of(gallery, path):
    """Two ways to go on after a question about a picture: the last token of the prompt opens both."""
    row = example(gallery, 5, path, 7)
    labels = (IGNORED, 8, 9)
    return PairExample(row.ids[:-1], (7, 8, 9), (7, 11, 12, 13), labels, (IGNORED, 11, 12, 13), 1.0, row.pictures)


def test_pairs_share_the_pictures_of_their_prompt(gallery, files):
    """Log-probabilities of a packed batch are those of the rows one by one, each a document of prompt and answer."""
    decoder = sighted_decoder()
    pairs = [
        pair_of(gallery, files["cup"]),
        PairExample((4, 6), (3, 8), (3, 9, 9), (IGNORED, 8), (IGNORED, 9, 9), 1.0),
        pair_of(gallery, files["cat"]),
    ]
    batch = pack_pairs(pairs, gallery)
    assert batch.positions_T.shape == (batch.num_tokens, 3)
    found = [values.tolist() for values in pair_log_probs(decoder, batch)]
    for side, (branch, labels) in enumerate((("chosen", "chosen_labels"), ("rejected", "rejected_labels"))):
        for n, e in enumerate(pairs):
            whole = Example((*e.prefix, *getattr(e, branch)), (*[IGNORED] * len(e.prefix), *getattr(e, labels)), e.pictures)
            alone = gallery.pack([whole])
            loss = HeldOut(decoder, [alone])().loss * alone.learned
            assert found[side][n] == pytest.approx(-loss, abs=2e-5)
    assert batch.pairs == sum(causal_pairs([a + b]) + causal_pairs([a + c]) - causal_pairs([a]) for a, b, c in batch.groups)


def test_judged_answers_keep_their_pictures(gallery, files):
    one, two = (example(gallery, 5, files[name], 7) for name in ("cup", "cat"))
    judged = [JudgedExample(row.ids[:-1], (7, 8, 9), (IGNORED, 8, 9), good, row.pictures) for row, good in ((one, True), (two, False))]
    batch = pack_judged(judged, gallery)
    assert batch.seen.grids == tuple(picture.grid for row in (one, two) for picture in row.pictures)
    assert batch.good_P.tolist() == [True, False]
