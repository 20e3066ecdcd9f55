// The operators on single layers as torch sees them.
#include "tensors.h"

namespace {

using namespace ernie::torch_side;

Tensor linear(const Tensor& x, const std::optional<Tensor>& norm, double eps, const Tensor& packed, const Tensor& scale, int64_t bits,
              int64_t out_size, const std::optional<Tensor>& addend, const std::string& isa) {
  const ernie::Rows rows = rows_of(x, "x");
  const int64_t T = x.size(0), I = x.size(1);
  const ernie::Packed w = packed_of(packed, scale, out_size, bits, I);
  Tensor out = empty<2>(x, {T, out_size});
  ernie::Output to{};
  to.type = rows.type, to.out = out.data_ptr(), to.stride = to.width = out_size;
  if (addend) {
    STD_TORCH_CHECK(addend->is_cpu() && addend->is_contiguous() && addend->scalar_type() == x.scalar_type() && addend->dim() == 2 &&
                        addend->size(0) == T && addend->size(1) == out_size,
                    "the addend must have the type of x and be [", T, ", ", out_size, "], contiguous");
    to.finish = ernie::Finish::add, to.addend = addend->data_ptr();
  }
  if (T) ernie::linear(kernels(isa), threads(), rows, T, I, norm_of(norm, eps, I), w, to);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> qkv(const Tensor& x, const std::optional<Tensor>& norm, double eps, const Tensor& packed, const Tensor& scale,
                                       int64_t bits, const Tensor& turns, int64_t N, int64_t K, int64_t H, const std::string& isa) {
  const ernie::Rows rows = rows_of(x, "x");
  const int64_t T = x.size(0), I = x.size(1);
  check_heads(N, K, H);
  const ernie::Packed w = packed_of(packed, scale, (N + 2 * K) * H, bits, I);
  STD_TORCH_CHECK(turns.is_cpu() && turns.is_contiguous() && turns.scalar_type() == ScalarType::Float && turns.dim() == 3 && turns.size(0) == T &&
                      turns.size(1) == H / 2 && turns.size(2) == 2,
                  "turns must be float32 [T, H / 2, 2], contiguous");
  Tensor q = empty<3>(x, {T, N, H}), k = empty<3>(x, {T, K, H}), v = empty<3>(x, {T, K, H});
  ernie::Output to{};
  to.finish = ernie::Finish::rotate, to.type = rows.type, to.width = w.O;
  to.out = q.data_ptr(), to.k = k.data_ptr(), to.v = v.data_ptr();
  to.turns = static_cast<const float*>(turns.data_ptr()), to.pairs = H / 2, to.rotated = (N + K) * H;
  to.q_width = N * H, to.kv_width = K * H;
  if (T) ernie::linear(kernels(isa), threads(), rows, T, I, norm_of(norm, eps, I), w, to);
  return {q, k, v};
}

// x + swiglu(norm(x) @ gate_up) @ down; without a norm, the part behind the plus: one expert
Tensor feed_forward(const Tensor& x, const std::optional<Tensor>& norm, double eps, const Tensor& gate_up, const Tensor& gate_up_scale, int64_t gate_up_bits,
                    const Tensor& down, const Tensor& down_scale, int64_t down_bits, int64_t inner, const std::string& isa) {
  const ernie::Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  const int64_t T = x.size(0), D = x.size(1);
  STD_TORCH_CHECK(inner > 0 && inner % 16 == 0, "the inner width must be a multiple of 16");
  const ernie::Packed first = packed_of(gate_up, gate_up_scale, 2 * inner, gate_up_bits, D);
  const ernie::Packed second = packed_of(down, down_scale, D, down_bits, inner);
  Tensor out = empty<2>(x, {T, D});
  if (T) ernie::feed_forward(kernels(isa), threads(), rows, T, D, norm_of(norm, eps, D), first, second, out.data_ptr());
  return out;
}

Tensor bf16_linear(const Tensor& x, const Tensor& weight, const std::string& isa) {
  const ernie::Rows rows = rows_of(x, "x");
  const int64_t T = x.size(0), O = weight.dim() == 2 ? weight.size(0) : 0;
  const ernie::Packed w = whole_of(weight, O, x.size(1));
  Tensor out = empty<2>(x, {T, O});
  ernie::Output to{};
  to.type = rows.type, to.out = out.data_ptr(), to.stride = to.width = O;
  if (T && O) ernie::whole_linear(kernels(isa), threads(), rows, T, w, to);
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const std::string& isa) {
  const ernie::Rows rows = rows_of(x, "x");
  const int64_t T = x.size(0), D = x.size(1);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "the norm's weight must have the type of x");
  const ernie::Norm norm = norm_of(weight, eps, D);
  Tensor out = empty<2>(x, {T, D});
  if (T) ernie::rms_norm(kernels(isa), threads(), rows, T, D, norm, out.data_ptr());
  return out;
}

Tensor rotate(const Tensor& x, const Tensor& turns, const std::string& isa) {
  const ernie::Rows rows = rows_of(x, "x");
  const int64_t T = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(turns.is_cpu() && turns.is_contiguous() && turns.scalar_type() == ScalarType::Float && turns.dim() == 3 && turns.size(0) == T &&
                      turns.size(1) > 0 && turns.size(1) % 8 == 0 && turns.size(2) == 2 && width % (2 * turns.size(1)) == 0,
                  "turns must be float32 [T, H / 2, 2], contiguous, with a head size that is a multiple of 16 and divides the width of x");
  Tensor out = empty<2>(x, {T, width});
  if (T) ernie::rotate(kernels(isa), threads(), rows, T, width, turns.size(1), static_cast<const float*>(turns.data_ptr()), out.data_ptr());
  return out;
}

Tensor swiglu(const Tensor& x, const std::string& isa) {
  const ernie::Rows rows = rows_of(x, "x");
  const int64_t T = x.size(0), width = x.size(1) / 2;
  STD_TORCH_CHECK(x.size(1) % 2 == 0, "x must hold a gate and as many columns more");
  Tensor out = empty<2>(x, {T, width});
  if (T) ernie::swiglu(kernels(isa), threads(), rows, T, width, out.data_ptr());
  return out;
}

Tensor paged_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& pages, const Tensor& lengths, int64_t page_size,
                       const std::string& isa) {
  STD_TORCH_CHECK(q.is_cpu() && q.is_contiguous() && q.dim() == 3, "q must be [sequences, N, H], contiguous, on the CPU");
  STD_TORCH_CHECK(keys.is_cpu() && keys.is_contiguous() && keys.dim() == 3 && values.is_cpu() && values.is_contiguous() && values.dim() == 3 &&
                      keys.size(0) == values.size(0) && keys.size(1) == values.size(1) && keys.size(2) == values.size(2) &&
                      keys.scalar_type() == values.scalar_type(),
                  "keys and values must both be [slots, K, H] of one type, contiguous, on the CPU");
  const int64_t B = q.size(0), N = q.size(1), H = q.size(2), K = keys.size(1);
  STD_TORCH_CHECK(keys.size(2) == H, "head sizes of queries and keys must be equal");
  check_heads(N, K, H);
  STD_TORCH_CHECK(pages.is_cpu() && pages.is_contiguous() && pages.scalar_type() == ScalarType::Long && pages.dim() == 2 && pages.size(0) == B &&
                      lengths.is_cpu() && lengths.is_contiguous() && lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1 &&
                      lengths.size(0) == B && page_size > 0,
                  "pages must be int64 [sequences, P] and lengths int64 [sequences], contiguous");
  ernie::PagedJob job{};
  job.q = q.data_ptr(), job.keys = keys.data_ptr(), job.values = values.data_ptr();
  job.type = type_of(q, "q"), job.cache_type = type_of(keys, "keys");
  job.pages = static_cast<const int64_t*>(pages.data_ptr()), job.lengths = static_cast<const int64_t*>(lengths.data_ptr());
  job.max_pages = pages.size(1), job.page_size = page_size, job.N = N, job.K = K, job.H = H;
  for (int64_t b = 0; b < B; b++)
    check_pages(job.pages + b * job.max_pages, job.max_pages, page_size, job.lengths[b], keys.size(0), b);
  Tensor out = empty<3>(q, {B, N, H});
  job.out = out.data_ptr();
  if (B) ernie::paged(kernels(isa), threads(), job, B);
  return out;
}

std::string available() { return ernie::available(); }

int64_t interface_number() { return kInterface; }

}  // namespace

STABLE_TORCH_LIBRARY(ernie45, m) {
  m.def("linear(Tensor x, Tensor? norm, float eps, Tensor packed, Tensor scale, int bits, int out_size, Tensor? addend, str isa) -> Tensor");
  m.def("qkv(Tensor x, Tensor? norm, float eps, Tensor packed, Tensor scale, int bits, Tensor turns, int heads, int kv_heads, int head_size, "
        "str isa) -> (Tensor, Tensor, Tensor)");
  m.def("feed_forward(Tensor x, Tensor? norm, float eps, Tensor gate_up, Tensor gate_up_scale, int gate_up_bits, Tensor down, "
        "Tensor down_scale, int down_bits, int inner, str isa) -> Tensor");
  m.def("bf16_linear(Tensor x, Tensor weight, str isa) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, str isa) -> Tensor");
  m.def("rotate(Tensor x, Tensor turns, str isa) -> Tensor");
  m.def("swiglu(Tensor x, str isa) -> Tensor");
  m.def("paged_attention(Tensor q, Tensor keys, Tensor values, Tensor pages, Tensor lengths, int page_size, str isa) -> Tensor");
  m.def("available() -> str");
  m.def("interface_number() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ernie45, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("qkv", TORCH_BOX(&qkv));
  m.impl("feed_forward", TORCH_BOX(&feed_forward));
  m.impl("bf16_linear", TORCH_BOX(&bf16_linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
}

STABLE_TORCH_LIBRARY_IMPL(ernie45, CompositeExplicitAutograd, m) {
  m.impl("available", TORCH_BOX(&available));
  m.impl("interface_number", TORCH_BOX(&interface_number));
}
