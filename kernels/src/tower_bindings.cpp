// One block of a vision tower as torch sees it, see tower.h and ernie45/ops/tower.py.
#include "tensors.h"
#include "tower.h"

namespace {

using namespace ernie::torch_side;

const ernie::TowerKernels& tower_of(const std::string& isa) {
  const ernie::TowerKernels* tower = kernels(isa).tower;
  STD_TORCH_CHECK(tower, "the ", isa, " kernels compute no vision towers");
  return *tower;
}

const uint16_t* bfloat16(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == ScalarType::BFloat16 && t.numel() == count, name, " must be bfloat16 of ", count,
                  " numbers, contiguous, on the CPU");
  return static_cast<const uint16_t*>(t.data_ptr());
}

ernie::TowerNorm norm_of_tower(const Tensor& weight, const Tensor& bias, double eps, int64_t D) {
  return {bfloat16(weight, "the norm's weight", D), bfloat16(bias, "the norm's bias", D), float(eps)};
}

ernie::TowerMatrix matrix_of(const Tensor& weight, const std::optional<Tensor>& scale, const Tensor& bias, int64_t O, int64_t I) {
  ernie::TowerMatrix m{nullptr, {}, bfloat16(bias, "the bias", O), O, I};
  if (scale) {
    m.packed = packed_of(weight, *scale, O, 8, I);
    STD_TORCH_CHECK(m.packed.I == I && m.packed.G == 1 && I % 64 == 0, "packed weights of a tower have one group, and ", I, " inputs are no multiple of 64");
  } else {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == I, "the weight must be [", O, ", ", I, "]");
    m.whole = bfloat16(weight, "the weight", O * I);
  }
  return m;
}

struct Call {
  ernie::Patches patches;
  ernie::Heads heads;
  const uint16_t* x;
  int64_t D;
};

Call call_of(const Tensor& x, const Tensor& heads, int64_t N, int64_t size, int64_t first) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) > 0 && x.size(1) > 0 && x.size(2) > 0 && x.size(2) <= kWidestInput && x.size(2) % 32 == 0,
                  "x must be [frames, patches, D] with a width that is a multiple of 32");
  const int64_t G = x.size(0), count = x.size(1), D = x.size(2);
  STD_TORCH_CHECK(N > 0 && D % N == 0 && D / N % 16 == 0 && D / N <= 128, "heads must be multiples of 16 wide, up to 128");
  STD_TORCH_CHECK(size > 0 && size <= (int64_t(1) << 24) && first >= 0 && first % ernie::kFramePadding == 0 && count <= size - first &&
                      (count % ernie::kFramePadding == 0 || first + count == size),
                  "patches ", first, " .. ", first + count, " are no part of a frame of ", size, " that ends at a multiple of 32 or at its end");
  ernie::Heads h{nullptr, N, D / N, size};
  h.data = const_cast<uint16_t*>(bfloat16(heads, "the heads", G * N * h.part()));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(h.data) % 64 == 0, "the heads must begin at a multiple of 64 bytes");
  return {{G, size, first, count}, h, bfloat16(x, "x", G * count * D), D};
}

void tower_heads(const Tensor& x, const Tensor& norm, const Tensor& norm_bias, double eps, const Tensor& qkv, const std::optional<Tensor>& qkv_scale,
                 const Tensor& qkv_bias, const Tensor& turns, int64_t N, int64_t size, int64_t first, const Tensor& heads, const std::string& isa) {
  const Call c = call_of(x, heads, N, size, first);
  STD_TORCH_CHECK(turns.is_cpu() && turns.is_contiguous() && turns.scalar_type() == ScalarType::Float && turns.dim() == 3 &&
                      turns.size(0) == c.patches.count && turns.size(1) == c.heads.H / 2 && turns.size(2) == 2,
                  "turns must be float32 [patches, H / 2, 2], contiguous");
  const ernie::TowerQkv w{norm_of_tower(norm, norm_bias, eps, c.D), matrix_of(qkv, qkv_scale, qkv_bias, 3 * c.D, c.D),
                          static_cast<const float*>(turns.data_ptr())};
  ernie::tower_heads(tower_of(isa), threads(), w, c.patches, c.x, c.heads);
}

Tensor tower_rest(const Tensor& x, const Tensor& heads, int64_t N, int64_t size, int64_t first, const Tensor& out, const std::optional<Tensor>& out_scale,
                  const Tensor& out_bias, const Tensor& norm, const Tensor& norm_bias, double eps, const Tensor& up, const std::optional<Tensor>& up_scale,
                  const Tensor& up_bias, const Tensor& down, const std::optional<Tensor>& down_scale, const Tensor& down_bias, const std::string& isa) {
  const Call c = call_of(x, heads, N, size, first);
  const int64_t F = up_bias.numel();
  STD_TORCH_CHECK(F > 0 && F <= kWidestInput && F % 32 == 0, "the inner width must be a multiple of 32");
  const ernie::TowerRest w{matrix_of(out, out_scale, out_bias, c.D, c.D), norm_of_tower(norm, norm_bias, eps, c.D),
                           matrix_of(up, up_scale, up_bias, F, c.D), matrix_of(down, down_scale, down_bias, c.D, F)};
  Tensor result = empty<3>(x, {x.size(0), x.size(1), c.D});
  ernie::tower_rest(tower_of(isa), threads(), w, c.patches, c.x, c.heads, static_cast<uint16_t*>(result.data_ptr()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ernie45, m) {
  m.def("tower_heads(Tensor x, Tensor norm, Tensor norm_bias, float eps, Tensor qkv, Tensor? qkv_scale, Tensor qkv_bias, Tensor turns, int heads, "
        "int size, int first, Tensor(a!) space, str isa) -> ()");
  m.def("tower_rest(Tensor x, Tensor space, int heads, int size, int first, Tensor out, Tensor? out_scale, Tensor out_bias, Tensor norm, "
        "Tensor norm_bias, float eps, Tensor up, Tensor? up_scale, Tensor up_bias, Tensor down, Tensor? down_scale, Tensor down_bias, str isa) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ernie45, CPU, m) {
  m.impl("tower_heads", TORCH_BOX(&tower_heads));
  m.impl("tower_rest", TORCH_BOX(&tower_rest));
}
