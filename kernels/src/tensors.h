// Tensors as the kernels take them: every size is checked here, since behind there are only pointers.
// Built on the stable ABI: one library serves every Python and every torch from 2.10 on.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "cpu.h"
#include "layers.h"

namespace ernie::torch_side {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWidestInput = 65536;

// The number of the operators' interface: raised, here and in ernie45/ops/native.py, whenever an operator's arguments or what they mean change.
constexpr int64_t kInterface = 5;

inline const ernie::Kernels& kernels(const std::string& isa) {
  const ernie::Kernels* found = ernie::choose(isa);
  STD_TORCH_CHECK(found, "no kernels called '", isa, "' on this machine; it can run: ", ernie::available());
  return *found;
}

inline void run_on_threads(int64_t count, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) { body(context); });
}

inline ernie::Threads threads() { return {int64_t(torch::stable::get_num_threads()), run_on_threads}; }

inline ernie::Type type_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return t.scalar_type() == ScalarType::Float ? ernie::Type::f32 : ernie::Type::bf16;
}

// [T, I] with rows that lie in one piece each
inline ernie::Rows rows_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1), name, " must be [T, I] on the CPU, each row in one piece");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(1) <= kWidestInput, name, " must be 1 .. ", kWidestInput, " wide");
  return {x.data_ptr(), type_of(x, name), x.stride(0)};
}

// `type` as aoti_torch_dtype_... names it
template <size_t n>
Tensor empty_of(int32_t type, const std::array<int64_t, n>& sizes) {
  std::array<int64_t, n> strides;
  int64_t step = 1;
  for (size_t i = n; i-- > 0;) strides[i] = step, step *= sizes[i];
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(n, sizes.data(), strides.data(), type, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

template <size_t n>
Tensor empty(const Tensor& like, const std::array<int64_t, n>& sizes) {
  return empty_of<n>(like.scalar_type() == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16(), sizes);
}

inline ernie::Packed packed_of(const Tensor& value, const Tensor& scale, int64_t out_size, int64_t format, int64_t in_size) {
  const int64_t bits = format & 15;  // see PackedWeight.format
  const bool hadamard = format & 16, float_inputs = format & 32;
  STD_TORCH_CHECK(format >= 0 && format < 64, "there is no weight format ", format);
  STD_TORCH_CHECK(bits == 4 || bits == 8, "weights have 4 or 8 bits, not ", bits);
  STD_TORCH_CHECK(value.is_cpu() && value.is_contiguous() && value.scalar_type() == ScalarType::Byte && value.dim() == 3 && value.size(2) == 64,
                  "packed weights must be uint8 [O / 16, I * bits / 32, 64], contiguous, on the CPU");
  STD_TORCH_CHECK(scale.is_cpu() && scale.is_contiguous() && scale.scalar_type() == ScalarType::Half && scale.dim() == 3 && scale.size(2) == 16 &&
                      scale.size(0) == value.size(0) && scale.size(1) > 0,
                  "weight scales must be float16 [O / 16, groups, 16], contiguous, on the CPU");
  ernie::Packed w{static_cast<const uint8_t*>(value.data_ptr()), static_cast<const uint16_t*>(scale.data_ptr()), out_size,
                  value.size(1) * 32 / bits, scale.size(1), int(bits), hadamard, float_inputs};
  STD_TORCH_CHECK(out_size > 0 && w.blocks() == value.size(0), "packed weights of ", value.size(0), " blocks of 16 do not hold ", out_size, " rows");
  STD_TORCH_CHECK(w.I % w.G == 0 && w.group() % 32 == 0, "packed weights of width ", w.I, " do not fall into ", w.G, " groups of a multiple of 32");
  STD_TORCH_CHECK(w.I >= in_size && w.I <= kWidestInput, "packed weights of width ", w.I, " do not take activations of width ", in_size);
  return w;
}

// A bfloat16 matrix as it is stored.
inline ernie::Packed whole_of(const Tensor& weight, int64_t out_size, int64_t in_size) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous() && weight.scalar_type() == ScalarType::BFloat16 && weight.dim() == 2 &&
                      weight.size(0) == out_size && weight.size(1) == in_size && in_size <= kWidestInput,
                  "a whole weight must be bfloat16 [", out_size, ", ", in_size, "], contiguous, on the CPU");
  return {static_cast<const uint8_t*>(weight.data_ptr()), nullptr, out_size, in_size, 1, 16, false, false};
}

// Of a request of `length` keys: its pages are in its table of `max_pages`, and the cache of `num_slots` has them. Nothing here may overflow.
inline void check_pages(const int64_t* pages, int64_t max_pages, int64_t page_size, int64_t length, int64_t num_slots, int64_t request) {
  const int64_t needed = length > 0 ? (length - 1) / page_size + 1 : 0;
  STD_TORCH_CHECK(length > 0 && needed <= max_pages, "request ", request, " of length ", length, " does not fit its page table");
  for (int64_t p = 0; p < needed; p++)
    STD_TORCH_CHECK(pages[p] >= 0 && pages[p] < num_slots / page_size, "request ", request, " names page ", pages[p], ", which the cache does not have");
}

inline void check_heads(int64_t N, int64_t K, int64_t H) {
  STD_TORCH_CHECK(K > 0 && N >= K && N <= kWidestInput && N % K == 0 && H > 0 && H % 16 == 0 && H <= kWidestInput && N * H <= kWidestInput,
                  "query heads must be a multiple of key heads, the head size of 16, and all heads at most ", kWidestInput, " wide");
}

inline ernie::Norm norm_of(const std::optional<Tensor>& weight, double eps, int64_t width) {
  if (!weight) return {nullptr, ernie::Type::f32, 0.0f};
  STD_TORCH_CHECK(weight->is_cpu() && weight->is_contiguous() && weight->numel() == width, "the norm's weight must be [", width, "] on the CPU");
  return {weight->data_ptr(), type_of(*weight, "the norm's weight"), float(eps)};
}

}  // namespace ernie::torch_side
