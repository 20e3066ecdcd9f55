// Products of bfloat16 weights, as they are stored, with float32 activations. Compiled once per instruction set (ERNIE_ISA), products contracted
// to fused ones.
//
// Few tokens meet the weights where they lie; for more of them four rows at a time are widened first, which then stay in the nearest cache.
// Either way a sum runs over lanes of inputs in order and then over the lanes, however many tokens stand beside it.
#include "lanes.h"

namespace ernie {
namespace ERNIE_ISA {

constexpr int kRowsAtOnce = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTokensAtOnce = 6;  // 24 sums, four weights and an activation: 29 of 32 registers
#else
constexpr int kTokensAtOnce = 2;
#endif
constexpr int64_t kTokens = 48;  // stay in the second cache while a panel of weights passes by

// c[t][r] = four rows of the weight, `stride` apart, times T rows of x, I apart
template <int T, class E>
static inline void dots(const E* w, int64_t stride, const float* x, int64_t I, float* c) {
  W s[T][kRowsAtOnce] = {};
  const int64_t ahead = stride < 2048 ? kRowsAtOnce * stride : 1024;  // the next four rows, or further on in these
  for (int64_t i = 0; i < I; i += kLanes) {
    W v[kRowsAtOnce];
#pragma GCC unroll 4
    for (int r = 0; r < kRowsAtOnce; r++) {
      if (sizeof(E) == 2 && i % 32 == 0) __builtin_prefetch(w + r * stride + i + ahead);
      v[r] = part(w + r * stride + i);
    }
#pragma GCC unroll 6
    for (int t = 0; t < T; t++) {
      const W a = part(x + t * I + i);
#pragma GCC unroll 4
      for (int r = 0; r < kRowsAtOnce; r++) s[t][r] += v[r] * a;
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < T; t++) totals_of(s[t], c + t * 16);
}

template <class E, int T = kTokensAtOnce>
static void dots_of(const E* w, int64_t stride, const float* x, int64_t I, int64_t count, float* c) {
  if constexpr (T > 1) {
    if (count < T) return dots_of<E, T - 1>(w, stride, x, I, count, c);
  }
  dots<T>(w, stride, x, I, c);
}

// Four rows as float32, zeros behind their ends; the last row stands in for those that do not exist.
static void widen(const Packed& w, int64_t row, int64_t I, float* to) {
  for (int r = 0; r < kRowsAtOnce; r++, to += I) {
    const auto* from = reinterpret_cast<const uint16_t*>(w.value) + (row + r < w.O ? row + r : w.O - 1) * w.I;
    for (int64_t i = 0; i < I; i += 16) {
      const V v = i < w.I ? get(from, Type::bf16, i, int(w.I - i < 16 ? w.I - i : 16)) : V{};
      std::memcpy(to + i, &v, 64);
    }
  }
}

// c[t][16] = count tokens times the 16 rows of one block
static void block_dots(const Packed& w, int64_t block, const float* x, int64_t I, int64_t count, float* c, float* wide) {
  const bool whole_vectors = w.I == I && block * 16 + 16 <= w.O;
  for (int64_t r = 0; r < 16; r += kRowsAtOnce) {
    const int64_t row = block * 16 + r;
    if (row >= w.O) {
      for (int64_t t = 0; t < count; t++) std::memset(c + t * 16 + r, 0, sizeof(float) * kRowsAtOnce);
    } else if (whole_vectors && count <= kTokensAtOnce) {
      dots_of(reinterpret_cast<const uint16_t*>(w.value) + row * w.I, w.I, x, I, count, c + r);
    } else {
      widen(w, row, I, wide);
      for (int64_t t = 0; t < count; t += kTokensAtOnce)
        dots_of(static_cast<const float*>(wide), I, x + t * I, I, count - t < kTokensAtOnce ? count - t : kTokensAtOnce, c + t * 16 + r);
    }
  }
}

size_t whole_scratch(const Packed& w) { return size_t(kRowsAtOnce * w.padded()) * sizeof(float); }

void whole(const Packed& w, const Quantised& x, const void*, int64_t block, int64_t end, const Output& out, void* scratch) {
  alignas(64) float c[kTokens * 16], up[kTokens * 16];
  const bool pairs = out.finish == Finish::swiglu;
  const int64_t half = w.blocks() / 2;
  auto* wide = static_cast<float*>(scratch);
  for (int64_t first = 0; first < x.T; first += kTokens) {
    const int64_t count = x.T - first < kTokens ? x.T - first : kTokens;
    const float* tokens = reinterpret_cast<const float*>(x.value) + first * x.I;
    for (int64_t b = block; b < end; b++) {
      block_dots(w, b, tokens, x.I, count, c, wide);
      if (pairs) block_dots(w, half + b, tokens, x.I, count, up, wide);
      for (int64_t t = 0; t < count; t++)
        pairs ? finish_pair(out, first + t, b * 16, c + t * 16, up + t * 16) : finish_16(out, first + t, b * 16, c + t * 16);
    }
  }
}

}  // namespace ERNIE_ISA
}  // namespace ernie
