// AdamW over one tensor in one pass: gradient, weight and both means are read once and written once. Written with the compiler's vector types
// and compiled once per instruction set (ERNIE_ISA); no product is contracted, so all give the same bits.
#include "rows.h"

namespace ernie {
namespace ERNIE_ISA {

static inline void get(const uint16_t* p, int n, H16& h) {
  h = H16{};
  std::memcpy(&h, p, size_t(n) * 2);
}

// A bfloat16 number and what it lacks of the float32 number it stands for, as a difference of their bits.
static inline V joined(H16 high, H16 low) {
  using S16 = int16_t __attribute__((vector_size(32)));
  const U difference = reinterpret_cast<U>(__builtin_convertvector(reinterpret_cast<S16>(low), I));
  return reinterpret_cast<V>((__builtin_convertvector(high, U) << 16) + difference);
}
static inline H16 high_of(V v) { return __builtin_convertvector((reinterpret_cast<U>(v) + 0x8000) >> 16, H16); }
static inline H16 low_of(V v, H16 high) { return __builtin_convertvector((reinterpret_cast<U>(v) - (__builtin_convertvector(high, U) << 16)) & 0xffff, H16); }

// Numbers that look random, of a place and a step: the mixing of 32 bits by Wellons ("lowbias32").
static inline U noise(int64_t at, uint32_t step) {
  constexpr U lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  U x = (lanes + uint32_t(at)) * 0x9e3779b1u + step * 0x85ebca77u;
  x ^= x >> 16, x *= 0x7feb352du;
  x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// To the type of the state; bfloat16 by chance, up as often as the number is near the upper neighbour. 16 bits of `chance` count.
static inline void keep(void* to, Type type, int64_t at, V v, U chance, int n) {
  if (type == Type::f32) return put(to, type, at, v, n);
  const H16 h = __builtin_convertvector((reinterpret_cast<U>(v) + (chance & 0xffff)) >> 16, H16);
  std::memcpy(static_cast<uint16_t*>(to) + at, &h, size_t(n) * 2);
}

void adamw(const AdamwJob& j, int64_t first, int64_t end) {
  auto* high = static_cast<uint16_t*>(j.weight);
  auto* low = static_cast<uint16_t*>(j.low);
  for (int64_t i = first; i < end; i += 16) {
    const int n = int(end - i < 16 ? end - i : 16);
    V w;
    if (low) {
      H16 h, l;
      get(high + i, n, h), get(low + i, n, l);
      w = joined(h, l);
    } else {
      w = get(j.weight, Type::f32, i, n);
    }
    const V g = get(j.gradient, j.gradient_type, i, n) * j.scale;
    V mean = get(j.mean, j.state_type, i, n), square = get(j.square, j.state_type, i, n);
    mean = mean + (g - mean) * j.mean_share;
    square = square * j.square_rest + g * g * j.square_share;
    w = w - w * j.decay;
    V root;
    for (int lane = 0; lane < 16; lane++) root[lane] = std::sqrt(square[lane]);
    w = w - mean * j.rate / (root * j.root_scale + j.eps);
    const U chance = noise(i, j.step);
    keep(j.mean, j.state_type, i, mean, chance, n);
    keep(j.square, j.state_type, i, square, chance >> 16, n);
    if (low) {
      const H16 h = high_of(w), l = low_of(w, h);
      std::memcpy(high + i, &h, size_t(n) * 2);
      std::memcpy(low + i, &l, size_t(n) * 2);
    } else {
      put(j.weight, Type::f32, i, w, n);
    }
  }
}

}  // namespace ERNIE_ISA
}  // namespace ernie
