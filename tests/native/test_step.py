"""Whole steps in one native call against the decoder over the same cache, layer by layer, for every instruction set."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie45.engine.batch import BatchBuilder
from ernie45.engine.cache import PagedAttend, PagedCache
from ernie45.engine.scheduler import Plan, PlanRow
from ernie45.models.config import ExpertsConfig, TextConfig
from ernie45.models.native import native_network
from ernie45.models.text import Decoder
from ernie45.nn.layers import RMSNorm
from ernie45.quant.model import quantise_model
from ernie45.quant.spec import QuantSpec

pytestmark = pytest.mark.native

V, PAGES, SIZE = 97, 24, 16  # vocabulary, and pages of the cache and their size


def made(experts=False, dtype=torch.float32, tied=True, shared=1, scheme="w4a8-g32", bias=False, **sizes) -> Decoder:
    """A decoder in `dtype`; without a scheme its matrices are bfloat16, as those of a model that is stored so."""
    usual = {"hidden_size": 80, "num_heads": 6, "num_kv_heads": 2, "head_size": 32, "ffn_size": 96, "vocab_size": V, "expert_size": 48}
    sizes = usual | sizes
    routed = {"num_experts": 5, "top_k": 2, "expert_size": sizes.pop("expert_size"), "first_layer": 1, "last_layer": 2}
    config = TextConfig(
        num_layers=3, tie_embeddings=tied, use_bias=bias, experts=ExpertsConfig(num_shared=shared, **routed) if experts else None, **sizes
    )
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.12)
    decoder = decoder.to(torch.bfloat16 if scheme is None else dtype).eval().requires_grad_(False)
    for layer in decoder.layers:
        if experts and hasattr(layer.ffn, "router"):
            layer.ffn.router.float()
            layer.ffn.router.selection_bias.normal_(0, 0.02, generator=torch.Generator().manual_seed(3))
    if scheme is not None:
        quantise_model(decoder, QuantSpec.uniform(scheme))
    elif dtype == torch.float32:  # activations alone
        decoder.embed.dtype = dtype
        for module in decoder.modules():
            if isinstance(module, RMSNorm):
                module.float()
    return decoder


def prompt(length, seed=0):
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Served:
    """Sequences over one cache; `feed` computes a step and returns float32 logits after each sequence's last token."""

    def __init__(self, decoder, kernels=None, size=SIZE):
        self.decoder, self.cache, self.builder = decoder, PagedCache(decoder.config, PAGES, size, decoder.dtype), BatchBuilder(size)
        self.network = None if kernels is None else native_network(decoder, kernels)
        assert kernels is None or self.network is not None
        self.at = {}

    @torch.inference_mode()
    def feed(self, parts):
        rows = []
        for name, tokens in parts.items():
            pages = tuple(range(name, PAGES, 4))  # never consecutive
            rows.append(PlanRow(str(name), tuple(tokens), self.at.get(name, 0), pages, True))
            self.at[name] = self.at.get(name, 0) + len(tokens)
        batch = self.builder.build(Plan(tuple(rows)))
        ends = [span.end - 1 for span in batch.spans]
        if self.network is None:
            h_TD = self.decoder(self.decoder.embed(batch.tokens_T), batch.positions_T, PagedAttend(self.cache, batch))
            return self.decoder.logits(h_TD[ends]).float()
        done = self.network.step(batch.tokens_T, batch.positions_T, batch.slots_T, self.cache.store, batch.places_R3, batch.pages_RP,
                                 self.cache.page_size, torch.tensor(ends))  # fmt: skip
        assert torch.equal(done.best_R, done.logits_RV.argmax(-1))
        assert torch.equal(done.best_logit_R, done.logits_RV.amax(-1))
        return done.logits_RV


# Attention rounds its weights to bfloat16 where tiles compute it, and quantised activations that fall on the other side of a half move by a
# whole step: such steps in three layers, seen against the largest logit. An error in the arithmetic shows as a difference near 1.
NEAR = {torch.float32: 0.03, torch.bfloat16: 0.12}
# Nothing is quantised: float32 differs by the order of its sums, bfloat16 by roundings that fall the other way.
NEAR_WHOLE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"scheme": "w4a8-g32-h"},
        {"tied": False, "scheme": "w8a8"},
        {"experts": True},
        {"experts": True, "shared": 0, "scheme": "w8a8-g64-h"},
        {"experts": True, "scheme": "w4a16-g32-h"},
        {"tied": False, "scheme": "w8a16"},
        {"scheme": None},
        {"scheme": None, "tied": False, "experts": True},
        {"scheme": None, "experts": True, "shared": 0},
    ],
)
def test_a_step_is_what_the_layers_compute(each, how, dtype):
    decoder = made(dtype=dtype, **how)
    ours, plain = Served(decoder, each), Served(decoder)
    for parts in (
        {0: prompt(1)},
        {0: prompt(3, 1), 1: prompt(40, 2), 2: prompt(1, 3)},
        {0: [5], 1: [6], 2: [7]},
        {2: prompt(9, 4), 0: [8]},
    ):
        got, want = ours.feed(parts), plain.feed(parts)
        assert (got - want).abs().max() <= (NEAR if how.get("scheme", "") is not None else NEAR_WHOLE)[dtype] * want.abs().max()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    size=st.integers(9, 150), groups=st.integers(1, 4), kv_heads=st.integers(1, 3), sixteens=st.integers(1, 5), vocab=st.integers(20, 90),
    expert_size=st.sampled_from([16, 80]), rows=st.integers(1, 70), experts=st.booleans(), bf16=st.booleans(),
)  # fmt: skip
def test_whole_matrices_of_odd_sizes(each, size, groups, kv_heads, sixteens, vocab, expert_size, rows, experts, bf16):
    dtype = torch.bfloat16 if bf16 and not experts else torch.float32  # rounded scores may choose another expert, and rightly
    decoder = made(
        experts, dtype, scheme=None, hidden_size=size, num_heads=groups * kv_heads, num_kv_heads=kv_heads, head_size=16,
        ffn_size=16 * sixteens, vocab_size=vocab, expert_size=expert_size,
    )  # fmt: skip
    tokens = [token % vocab for token in prompt(rows)]
    got, want = Served(decoder, each).feed({0: tokens, 1: tokens[:1]}), Served(decoder).feed({0: tokens, 1: tokens[:1]})
    assert (got - want).abs().max() <= NEAR_WHOLE[dtype] * want.abs().max()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    cuts=st.lists(st.integers(1, 59), max_size=4, unique=True), beside=st.integers(0, 12), experts=st.booleans(), bf16=st.booleans(),
    scheme=st.sampled_from(["w4a8-g32", None]),
)  # fmt: skip
def test_neither_cuts_nor_neighbours_change_a_bit(each, cuts, beside, experts, bf16, scheme):
    decoder = made(experts, torch.bfloat16 if bf16 else torch.float32, scheme=scheme)
    tokens = prompt(60)
    whole = Served(decoder, each).feed({0: tokens})
    served = Served(decoder, each)
    for n, (a, b) in enumerate(zip([0, *sorted(cuts)], [*sorted(cuts), 60], strict=True)):
        others = {1: prompt(beside, n), 3: prompt(1, n)} if beside else {}
        last = served.feed({**others, 0: tokens[a:b]})[-1:]
    assert torch.equal(last, whole)


@pytest.mark.parametrize("scheme", ["w4a8-g32", None])
def test_threads_change_nothing(kernels, scheme):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            served = Served(made(experts=True, scheme=scheme), kernels)
            results.append(torch.cat([served.feed({0: prompt(30), 1: prompt(1)}), served.feed({0: [4], 1: [5]})]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_blocks_of_keys_computed_apart_are_those_of_a_whole_row(each):
    """A prompt of 300 tokens is 16 pieces of attention: enough for one thread, while five share the pieces' blocks, as one token does."""
    decoder, tokens, results, before = made(dtype=torch.bfloat16), prompt(301), [], torch.get_num_threads()
    try:
        for threads, cut in ((1, 301), (5, 301), (1, 300), (5, 300), (2, 296)):
            torch.set_num_threads(threads)
            served = Served(decoder, each, size=64)
            last = served.feed({0: tokens[:cut]})
            results.append(served.feed({0: tokens[cut:]}) if cut < len(tokens) else last)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("scheme", ["w4a8-g32", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_other_requests_left_in_a_page_is_not_seen(each, dtype, scheme):
    decoder = made(dtype=dtype, scheme=scheme)
    clean, dirty = Served(decoder, each), Served(decoder, each)
    dirty.cache.store.fill_(float("nan"))
    assert torch.equal(clean.feed({0: prompt(20), 1: prompt(1)}), dirty.feed({0: prompt(20), 1: prompt(1)}))


def sketched(head_VD, dtype, group):
    """A step's way from embedding to best token with the head given, 8 bits in groups, and no layer that adds anything."""
    vocab_size, width = head_VD.shape
    config = TextConfig(hidden_size=width, num_layers=1, num_heads=2, num_kv_heads=1, head_size=16, ffn_size=32, vocab_size=vocab_size,
                        tie_embeddings=False)  # fmt: skip
    decoder = Decoder(config).initialise(torch.Generator().manual_seed(0), std=0.5).to(dtype).eval().requires_grad_(False)
    decoder.layers[0].attn.out.weight.zero_()
    decoder.layers[0].ffn.down.weight.zero_()
    decoder.head.weight.copy_(head_VD)
    quantise_model(decoder, QuantSpec.uniform(f"w8a8-g{group}" if group else "w8a8"))
    return decoder


def both_ways(decoder, kernels, tokens):
    """Best tokens and logits of a prompt's rows, with all logits and without them."""
    network, cache = native_network(decoder, kernels), PagedCache(decoder.config, PAGES, SIZE, decoder.dtype)
    batch = BatchBuilder(SIZE).build(Plan((PlanRow("a", tuple(tokens), 0, (0,), True),)))
    wanted = torch.arange(len(tokens))
    places = (batch.tokens_T, batch.positions_T, batch.slots_T, cache.store, batch.places_R3, batch.pages_RP, SIZE, wanted)
    return network.step(*places), network.step(*places, only_best=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    seed=st.integers(0, 999), vocab_size=st.integers(17, 1500), width=st.sampled_from([48, 64, 200, 256]), rows=st.integers(1, 9),
    group=st.sampled_from([0, 32, 64, 128]), bf16=st.booleans(),
    kind=st.sampled_from(["normal", "tied", "near", "zero", "one long row", "rare long inputs", "tiny"]),
)  # fmt: skip
def test_the_best_token_found_by_a_sketch_is_that_of_all_logits(each, seed, vocab_size, width, rows, group, bf16, kind):
    generator = torch.Generator().manual_seed(seed)
    head_VD = torch.randn(vocab_size, width, generator=generator)
    match kind:
        case "tied":  # the first of equal ones wins
            head_VD = head_VD[torch.arange(vocab_size) % 5]
        case "near":  # closer to each other than the sketch can tell
            head_VD = head_VD[:1] + 0.01 * head_VD
        case "zero":
            head_VD *= torch.randint(0, 2, (vocab_size, 1), generator=generator)
        case "one long row":
            head_VD[vocab_size // 2] *= 1000
        case "rare long inputs":
            head_VD[:, ::40] *= 50
        case "tiny":
            head_VD *= 1e-7
    decoder = sketched(head_VD, torch.bfloat16 if bf16 else torch.float32, group)
    whole, alone = both_ways(decoder, each, torch.randint(0, vocab_size, (rows,), generator=generator).tolist())
    assert (alone.logits_RV is None) == (rows <= 8), "few rows are found by the sketch, many as ever"
    assert torch.equal(alone.best_R, whole.logits_RV.argmax(-1))
    assert torch.equal(alone.best_R, whole.best_R)
    assert torch.equal(alone.best_logit_R, whole.best_logit_R)


def test_a_head_without_a_sketch_computes_all_logits(each):
    """Scales near the end of float16 have no room for steps that are 17 times as long; activations that stay floats have no sums."""
    head_VD = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    long = sketched(head_VD * 2e6, torch.float32, 64)
    floats = made(tied=False, scheme="w8a16")
    for decoder in (long, floats, made(scheme="w4a8-g32")):
        whole, alone = both_ways(decoder, each, [1, 2, 3])
        assert torch.equal(alone.logits_RV, whole.logits_RV)
        assert torch.equal(alone.best_R, whole.best_R)


def test_what_is_no_number_has_no_best_token_by_a_sketch_either(each):
    decoder = sketched(torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), torch.float32, 64)
    decoder.norm.weight[3] = float("nan")
    assert both_ways(decoder, each, [1, 2])[1].best_logit_R.isnan().all()


def test_what_is_no_number_has_no_best_token(each):
    decoder = made()
    decoder.norm.weight[3] = float("nan")
    served = Served(decoder, each)
    batch = served.builder.build(Plan((PlanRow("a", (1, 2), 0, (0,), True),)))
    done = served.network.step(batch.tokens_T, batch.positions_T, batch.slots_T, served.cache.store, batch.places_R3, batch.pages_RP, SIZE,
                               torch.tensor([1]))  # fmt: skip
    assert done.best_logit_R.isnan().all()


@pytest.mark.parametrize(
    "how", [{"bias": True}, {"bias": True, "experts": True}, {"scheme": None, "bias": True}, {"scheme": None, "head_size": 8}]
)
def test_what_the_kernels_do_not_know_stays_with_the_layers(kernels, how):
    assert native_network(made(**how), kernels) is None
    assert native_network(Decoder(made().config), kernels) is None  # in float32


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        ("tokens", torch.tensor([V, 1]), "not in the vocabulary"),
        ("tokens", torch.tensor([-1, 1]), "not in the vocabulary"),
        ("slots", torch.tensor([0, PAGES * SIZE]), "no slot"),
        ("places", torch.tensor([[0, 1, 0]]), "cover all rows"),
        ("places", torch.tensor([[0, 2, PAGES * SIZE]]), "page table"),
        ("places", torch.tensor([[1, 2, 0]]), "follow each other"),
        ("pages", torch.tensor([[PAGES]]), "does not have"),
        ("answers", torch.tensor([2]), "no row"),
        ("cache", torch.zeros(3, 2, 64, 1, 32), "cache must be"),
        ("cache", torch.zeros(3, 2, PAGES * SIZE, 2, 32).bfloat16(), "cache must be"),
        ("cache", torch.zeros(2, 2, PAGES * SIZE, 2, 32), "cache must be"),
        ("tokens", torch.tensor([1.0, 2.0]), "int64"),
        ("tokens", torch.tensor([1, 2], dtype=torch.int32), "int64"),
        ("tokens", torch.tensor([1, 2, 3]), r"\[T\]"),
        ("positions", torch.tensor([0]), "turns must be"),
        ("slots", torch.tensor([0, -1]), "no slot"),
        ("slots", torch.tensor([0]), r"\[T\]"),
        ("places", torch.tensor([[0, 2, -1]]), "follow each other"),
        ("places", torch.tensor([[0, 2, 2**63 - 1]]), "page table"),
        ("places", torch.tensor([[0, 2, 2**63 - 3]]), "page table"),
        ("places", torch.tensor([[0, 2**63 - 1, 0]]), "follow each other"),
        ("places", torch.tensor([[0, 2]]), "requests, 3"),
        ("pages", torch.tensor([[-1]]), "does not have"),
        ("pages", torch.tensor([[2**60]]), "does not have"),
        ("pages", torch.tensor([0]), "requests, P"),
        ("pages", torch.zeros(1, 0, dtype=torch.int64), "page table"),
        ("size", 0, "requests, P"),
        ("size", 2**63 - 1, "does not have"),
        ("answers", torch.tensor([-1]), "no row"),
        ("answers", torch.tensor([1], dtype=torch.int32), "int64"),
    ],
)
def test_places_that_do_not_exist_are_refused(kernels, place, value, word):
    network = native_network(made(), kernels)
    arguments = {
        "tokens": torch.tensor([1, 2]), "positions": torch.tensor([0, 1]), "slots": torch.tensor([0, 1]),
        "cache": torch.zeros(3, 2, PAGES * SIZE, 2, 32), "places": torch.tensor([[0, 2, 0]]), "pages": torch.tensor([[0]]),
        "size": SIZE, "answers": torch.tensor([1]),
    }  # fmt: skip
    assert network.step(*arguments.values()).logits_RV.shape == (1, V)
    with pytest.raises(RuntimeError, match=word):
        network.step(*(arguments | {place: value}).values())


def test_a_tensor_that_is_no_network_is_refused(kernels):
    with pytest.raises(RuntimeError, match="no opened network"):
        torch.ops.ernie45.set_head(torch.zeros(4096, dtype=torch.uint8), torch.zeros(1, 4, 64), torch.zeros(1, 1, 16), 4)
