// The vector that one instruction of this set adds, and sums over its lanes. Included by each instruction set inside its own namespace (ERNIE_ISA).
#pragma once
#include "rows.h"

namespace ernie {
namespace ERNIE_ISA {

// Loops that keep arrays of sums take this width: GCC 12 keeps those in registers only so.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using W = float __attribute__((vector_size(kLanes * 4), may_alias, aligned(4)));
using F4 = float __attribute__((vector_size(16)));

static inline W part(const float* p) { return *reinterpret_cast<const W*>(p); }
static inline W part(const uint16_t* p) {
  using Halves = uint16_t __attribute__((vector_size(kLanes * 2), may_alias, aligned(2)));
  using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
  return reinterpret_cast<W>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}

// The totals of four vectors: halves are folded pairwise, so that eight shuffles serve all four.
static inline void totals(const V* v, float* out) {
  const V ab = __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[0], v[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const V cd = __builtin_shufflevector(v[2], v[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[2], v[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  V s = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  s += __builtin_shufflevector(s, s, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  s += __builtin_shufflevector(s, s, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  for (int j = 0; j < 4; j++) out[j] = s[4 * j];
}

static inline void totals_of(const W* v, float* out) {
#if defined(__AVX512F__)
  totals(v, out);
#else
  for (int j = 0; j < 4; j++) {
    F4 s;
    std::memcpy(&s, &v[j], 16);
#if defined(__AVX__)
    s += __builtin_shufflevector(v[j], v[j], 4, 5, 6, 7);
#endif
    s += __builtin_shufflevector(s, s, 2, 3, 0, 1);
    out[j] = s[0] + s[1];
  }
#endif
}

}  // namespace ERNIE_ISA
}  // namespace ernie
