// A network as torch sees it: opened once, every matrix checked, into a tensor of plain data; then run a step at a time.
// Whoever holds the tensor must hold the matrices too, see ernie45/ops/network.py.
#include <cstring>

#include "step.h"
#include "tensors.h"

namespace {

using namespace ernie::torch_side;
using ernie::Network;

Network& network_of(const Tensor& data) {
  STD_TORCH_CHECK(data.is_cpu() && data.is_contiguous() && data.scalar_type() == ScalarType::Byte && data.numel() >= int64_t(sizeof(Network)),
                  "this is no opened network");
  Network& n = *static_cast<Network*>(data.data_ptr());
  STD_TORCH_CHECK(n.magic == ernie::kNetworkMagic && data.numel() == int64_t(sizeof(Network) + size_t(n.layers) * sizeof(ernie::Layer)),
                  "this is no opened network");
  return n;
}

ernie::Layer& layer_of(Network& n, int64_t layer) {
  STD_TORCH_CHECK(layer >= 0 && layer < n.layers, "the network has no layer ", layer);
  return n.layer(layer);
}

const void* norm_in(const Network& n, const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous() && weight.numel() == n.D && type_of(weight, "the norm's weight") == n.type,
                  "a norm's weight must be [", n.D, "] in the network's type");
  return weight.data_ptr();
}

// Without a scale: a whole matrix.
ernie::Packed matrix(const Tensor& value, const std::optional<Tensor>& scale, int64_t out_size, int64_t bits, int64_t in_size) {
  if (!scale) return whole_of(value, out_size, in_size);
  const ernie::Packed w = packed_of(value, *scale, out_size, bits, in_size);
  STD_TORCH_CHECK(w.I - in_size < w.group(), "packed weights of width ", w.I, " belong to wider activations than ", in_size);
  return w;
}

// The first expert's matrix of a stack [E, ...].
ernie::Packed stack(const Tensor& value, const std::optional<Tensor>& scale, int64_t E, int64_t out_size, int64_t bits, int64_t in_size) {
  const auto check = [E](const Tensor& t, int64_t dimensions) {
    STD_TORCH_CHECK(t.dim() == dimensions && t.size(0) == E && t.is_contiguous(), "stacked experts must be [", E, ", ...], contiguous");
  };
  check(value, scale ? 4 : 3);
  if (!scale) return whole_of(torch::stable::select(value, 0, 0), out_size, in_size);
  check(*scale, 4);
  return matrix(torch::stable::select(value, 0, 0), torch::stable::select(*scale, 0, 0), out_size, bits, in_size);
}

Tensor network(const Tensor& norm, double eps, int64_t layers, int64_t vocabulary, int64_t N, int64_t K, int64_t H) {
  STD_TORCH_CHECK(norm.dim() == 1 && norm.size(0) > 0 && norm.size(0) <= kWidestInput && layers > 0 && layers < 4096 && vocabulary > 0,
                  "a network needs a norm [D], layers and a vocabulary");
  check_heads(N, K, H);
  Tensor data = empty_of<1>(aoti_torch_dtype_uint8(), {int64_t(sizeof(Network) + size_t(layers) * sizeof(ernie::Layer))});
  std::memset(data.data_ptr(), 0, size_t(data.numel()));
  Network& n = *static_cast<Network*>(data.data_ptr());
  n.magic = ernie::kNetworkMagic, n.type = type_of(norm, "the norm's weight"), n.D = norm.size(0), n.N = N, n.K = K, n.H = H;
  n.vocabulary = vocabulary, n.layers = layers, n.eps = float(eps), n.norm = norm_in(n, norm);
  return data;
}

void set_embedding(const Tensor& network, const Tensor& values, const std::optional<Tensor>& scales, int64_t bits) {
  Network& n = network_of(network);
  if (scales || (n.type == ernie::Type::f32 && values.scalar_type() == ScalarType::BFloat16)) {
    n.packed_embedding = matrix(values, scales, n.vocabulary, bits, n.D);
    return;
  }
  STD_TORCH_CHECK(values.is_cpu() && values.is_contiguous() && type_of(values, "the embedding") == n.type && values.dim() == 2 &&
                      values.size(0) == n.vocabulary && values.size(1) == n.D,
                  "the embedding must be [", n.vocabulary, ", ", n.D, "] in the network's type");
  n.embedding = values.data_ptr();
}

void set_head(const Tensor& network, const Tensor& values, const std::optional<Tensor>& scales, int64_t bits) {
  Network& n = network_of(network);
  n.head = matrix(values, scales, n.vocabulary, bits, n.D);
}

// Draws the head's sketch; returns its memory, which must be kept as the matrices are, empty where the head has no sketch.
Tensor sketch_head(const Tensor& network) {
  Network& n = network_of(network);
  const size_t bytes = ernie::sketch_bytes(n.head);
  Tensor memory = empty_of<1>(aoti_torch_dtype_uint8(), {int64_t(bytes)});
  if (bytes && ernie::draw_sketch(threads(), n.head, memory.data_ptr(), n.sketch)) return memory;
  return empty_of<1>(aoti_torch_dtype_uint8(), {0});
}

void set_attention(const Tensor& network, int64_t layer, const Tensor& norm, const Tensor& qkv, const std::optional<Tensor>& qkv_scale, int64_t qkv_bits,
                   const Tensor& out, const std::optional<Tensor>& out_scale, int64_t out_bits) {
  Network& n = network_of(network);
  ernie::Layer& l = layer_of(n, layer);
  l.attention_norm = norm_in(n, norm);
  l.qkv = matrix(qkv, qkv_scale, (n.N + 2 * n.K) * n.H, qkv_bits, n.D);
  l.out = matrix(out, out_scale, n.D, out_bits, n.N * n.H);
}

void set_feed_forward(const Tensor& network, int64_t layer, const Tensor& norm, const Tensor& gate_up, const std::optional<Tensor>& gate_up_scale,
                      int64_t gate_up_bits, const Tensor& down, const std::optional<Tensor>& down_scale, int64_t down_bits, int64_t inner) {
  Network& n = network_of(network);
  ernie::Layer& l = layer_of(n, layer);
  STD_TORCH_CHECK(inner > 0 && inner % 16 == 0, "the inner width must be a multiple of 16");
  l.norm = norm_in(n, norm);
  l.gate_up = matrix(gate_up, gate_up_scale, 2 * inner, gate_up_bits, n.D);
  l.down = matrix(down, down_scale, n.D, down_bits, inner);
}

void set_experts(const Tensor& network, int64_t layer, const Tensor& norm, const Tensor& router, const Tensor& bias, const Tensor& gate_up,
                 const std::optional<Tensor>& gate_up_scale, const Tensor& down, const std::optional<Tensor>& down_scale, int64_t bits, int64_t inner,
                 int64_t top_k, double norm_min, const std::optional<Tensor>& counts) {
  Network& n = network_of(network);
  ernie::Layer& l = layer_of(n, layer);
  STD_TORCH_CHECK(router.is_cpu() && router.is_contiguous() && router.scalar_type() == ScalarType::Float && router.dim() == 2 && router.size(1) == n.D,
                  "the router must be float32 [E, ", n.D, "]");
  const int64_t E = router.size(0);
  STD_TORCH_CHECK(bias.is_cpu() && bias.is_contiguous() && bias.scalar_type() == ScalarType::Float && bias.numel() == E, "the bias must be float32 [", E, "]");
  STD_TORCH_CHECK(E > 0 && top_k > 0 && top_k <= E && inner > 0 && inner % 16 == 0, "experts must be chosen among those there are, their width a multiple of 16");
  STD_TORCH_CHECK(!counts || (counts->is_cpu() && counts->is_contiguous() && counts->scalar_type() == ScalarType::Long && counts->numel() == E),
                  "the counts must be int64 [", E, "]");
  l.norm = norm_in(n, norm);
  l.experts = {E, top_k, float(norm_min), static_cast<const float*>(router.data_ptr()), static_cast<const float*>(bias.data_ptr()),
               stack(gate_up, gate_up_scale, E, 2 * inner, bits, n.D), stack(down, down_scale, E, n.D, bits, inner), counts ? static_cast<int64_t*>(counts->data_ptr()) : nullptr};
}

const int64_t* whole(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::Long, name, " must be int64, contiguous, on the CPU");
  return static_cast<const int64_t*>(t.data_ptr());
}

void check_complete(const Network& n) {
  STD_TORCH_CHECK(n.embedding || n.packed_embedding.O, "the network has no embedding");
  for (int64_t i = 0; i < n.layers; i++)
    STD_TORCH_CHECK(n.layer(i).qkv.O && (n.layer(i).gate_up.O || n.layer(i).experts.E), "layer ", i, " of the network is not complete");
}

void check_places(const Network& n, const ernie::Step& s) {
  for (int64_t t = 0; t < s.T; t++) {
    STD_TORCH_CHECK(s.tokens[t] >= 0 && s.tokens[t] < n.vocabulary, "token ", s.tokens[t], " is not in the vocabulary");
    STD_TORCH_CHECK(s.slots[t] >= 0 && s.slots[t] < s.num_slots, "the cache has no slot ", s.slots[t]);
  }
  int64_t at = 0;
  for (int64_t r = 0; r < s.num_spans; r++) {
    const ernie::Span& span = s.spans[r];
    STD_TORCH_CHECK(span.first == at && span.end > at && span.end <= s.T && span.start >= 0, "spans must follow each other and hold rows");
    at = span.end;
    STD_TORCH_CHECK(span.start <= INT64_MAX - s.T, "request ", r, " does not fit its page table");
    check_pages(s.pages + r * s.max_pages, s.max_pages, s.page_size, span.start + span.end - span.first, s.num_slots, r);
  }
  STD_TORCH_CHECK(at == s.T, "spans must cover all rows");
  for (int64_t r = 0; r < s.num_answers; r++) STD_TORCH_CHECK(s.answers[r] >= 0 && s.answers[r] < s.T, "there is no row ", s.answers[r]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> step(const Tensor& network, const Tensor& tokens, const Tensor& turns, const Tensor& slots, Tensor cache,
                                                const Tensor& spans, const Tensor& pages, int64_t page_size, const Tensor& answers,
                                                bool only_best, const std::string& isa) {
  const Network& n = network_of(network);
  check_complete(n);
  ernie::Step s{};
  s.T = tokens.numel(), s.tokens = whole(tokens, "tokens"), s.slots = whole(slots, "slots");
  STD_TORCH_CHECK(slots.numel() == s.T && turns.is_cpu() && turns.is_contiguous() && turns.scalar_type() == ScalarType::Float && turns.dim() == 3 &&
                      turns.size(0) == s.T && turns.size(1) == n.H / 2 && turns.size(2) == 2,
                  "turns must be float32 [T, H / 2, 2] and slots [T]");
  STD_TORCH_CHECK(cache.is_cpu() && cache.is_contiguous() && cache.dim() == 5 && type_of(cache, "the cache") == n.type && cache.size(0) >= n.layers &&
                      cache.size(1) == 2 && cache.size(3) == n.K && cache.size(4) == n.H,
                  "the cache must be [layers, 2, slots, K, H] in the network's type");
  STD_TORCH_CHECK(page_size > 0 && spans.dim() == 2 && spans.size(1) == 3 && pages.dim() == 2 && pages.size(0) == spans.size(0),
                  "spans must be [requests, 3] and pages [requests, P]");
  s.turns = static_cast<const float*>(turns.data_ptr()), s.cache = static_cast<char*>(cache.data_ptr()), s.num_slots = cache.size(2);
  s.page_size = page_size, s.spans = reinterpret_cast<const ernie::Span*>(whole(spans, "spans")), s.num_spans = spans.size(0);
  s.pages = whole(pages, "pages"), s.max_pages = pages.size(1), s.answers = whole(answers, "answers"), s.num_answers = answers.numel(), s.only_best = only_best;
  check_places(n, s);
  Tensor hidden = empty_of<2>(n.type == ernie::Type::f32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(), {s.T, n.D});
  const int64_t R = n.head.O ? s.num_answers : 0;
  Tensor logits = empty_of<2>(aoti_torch_dtype_float32(), {ernie::by_sketch(n, s) ? 0 : R, n.vocabulary}), best = empty_of<1>(aoti_torch_dtype_int64(), {R}),
         best_logit = empty_of<1>(aoti_torch_dtype_float32(), {R});
  s.hidden = hidden.data_ptr(), s.logits = static_cast<float*>(logits.data_ptr());
  s.best = static_cast<int64_t*>(best.data_ptr()), s.best_logit = static_cast<float*>(best_logit.data_ptr());
  if (s.T) ernie::run_step(kernels(isa), threads(), n, s);
  return {hidden, logits, best, best_logit};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ernie45, m) {
  m.def("network(Tensor norm, float eps, int layers, int vocabulary, int heads, int kv_heads, int head_size) -> Tensor");
  m.def("set_embedding(Tensor(a!) network, Tensor values, Tensor? scales, int bits) -> ()");
  m.def("set_head(Tensor(a!) network, Tensor values, Tensor? scales, int bits) -> ()");
  m.def("sketch_head(Tensor(a!) network) -> Tensor");
  m.def("set_attention(Tensor(a!) network, int layer, Tensor norm, Tensor qkv, Tensor? qkv_scale, int qkv_bits, Tensor out, Tensor? out_scale, "
        "int out_bits) -> ()");
  m.def("set_feed_forward(Tensor(a!) network, int layer, Tensor norm, Tensor gate_up, Tensor? gate_up_scale, int gate_up_bits, Tensor down, "
        "Tensor? down_scale, int down_bits, int inner) -> ()");
  m.def("set_experts(Tensor(a!) network, int layer, Tensor norm, Tensor router, Tensor bias, Tensor gate_up, Tensor? gate_up_scale, Tensor down, "
        "Tensor? down_scale, int bits, int inner, int top_k, float norm_min, Tensor(b!)? counts=None) -> ()");
  m.def("step(Tensor network, Tensor tokens, Tensor turns, Tensor slots, Tensor(a!) cache, Tensor spans, Tensor pages, int page_size, "
        "Tensor answers, bool only_best, str isa) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ernie45, CPU, m) {
  m.impl("network", TORCH_BOX(&network));
  m.impl("set_embedding", TORCH_BOX(&set_embedding));
  m.impl("set_head", TORCH_BOX(&set_head));
  m.impl("sketch_head", TORCH_BOX(&sketch_head));
  m.impl("set_attention", TORCH_BOX(&set_attention));
  m.impl("set_feed_forward", TORCH_BOX(&set_feed_forward));
  m.impl("set_experts", TORCH_BOX(&set_experts));
  m.impl("step", TORCH_BOX(&step));
}
