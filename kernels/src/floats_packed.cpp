// Products of packed weights with activations that stayed floats. Whole numbers become float32 in registers; a group's products are summed
// first and meet its scale afterwards. Compiled once per instruction set (ERNIE_ISA), products contracted to fused ones.
//
// A row's sums run in the same order however many rows stand beside it: even and odd inputs of a group apart, then groups in order.
#include "rows.h"

namespace ernie {
namespace ERNIE_ISA {

#if defined(__AVX512F__)
constexpr int kRowsAtOnce = kFloatRows;  // two sums a row, the weights and one more: 26 of 32 registers
#else
constexpr int kRowsAtOnce = 2;
#endif

// The numbers of input `n` of a word of each of the 16 rows: the bits are set into 2^23's mantissa, which makes them a float32 as they stand.
template <int bits>
static inline V whole(U words, int n) {
  const int shift = bits == 8 || n < 4 ? 8 * n : 8 * (n - 4) + 4;
  const U bits_of = ((words >> shift) & (bits == 8 ? 255u : 15u)) | 0x4b000000u;
  return reinterpret_cast<V>(bits_of) - (8388608.0f + (bits == 8 ? 128.0f : 8.0f));
}

// c [T][16] = T rows of x, which lie side by side as [I][T], times the 16 rows of one block
template <int bits, int T>
static void tile(const Packed& w, int64_t block, const float* x, float* c) {
  constexpr int inputs = 32 / bits;  // of one word
  const uint8_t* p = w.value + block * w.block_bytes();
  const uint16_t* scale = w.scale + block * w.G * 16;
  const int64_t group = w.group();
  std::memset(c, 0, sizeof(float) * 16 * T);
  for (int64_t g = 0; g < w.G; g++) {
    V s[T][2] = {};
    for (int64_t k = 0; k < group; k += inputs, p += 64, x += inputs * T) {
      __builtin_prefetch(p + 4096);
      U words;
      std::memcpy(&words, p, 64);
#pragma GCC unroll 8
      for (int n = 0; n < inputs; n++) {
        const V v = whole<bits>(words, n);
#pragma GCC unroll 12
        for (int t = 0; t < T; t++) s[t][n & 1] += v * x[n * T + t];
      }
    }
    const V d = f32_of_f16(scale + g * 16);
#pragma GCC unroll 12
    for (int t = 0; t < T; t++) {
      const V sum = load(c + t * 16) + (s[t][0] + s[t][1]) * d;  // one fused product in every copy of this loop
      std::memcpy(c + t * 16, &sum, 64);
    }
  }
}

template <int bits, int T = kRowsAtOnce>
static void rows(const Packed& w, int64_t block, const float* x, int64_t count, float* c) {
  if constexpr (T > 1) {
    if (count < T) return rows<bits, T - 1>(w, block, x, count, c);
  }
  tile<bits, T>(w, block, x, c);
}

static void block_rows(const Packed& w, int64_t block, const float* x, int64_t count, float* c) {
  w.bits == 4 ? rows<4>(w, block, x, count, c) : rows<8>(w, block, x, count, c);
}

void packed(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, void* scratch) {
  alignas(64) float c[kRowsAtOnce * 16], up[kRowsAtOnce * 16];
  float* beside = static_cast<float*>(scratch);
  const bool pairs = out.finish == Finish::swiglu;
  const int64_t half = w.blocks() / 2;
  for (int64_t first = 0; first < x.T; first += kRowsAtOnce) {
    const int64_t count = x.T - first < kRowsAtOnce ? x.T - first : kRowsAtOnce;
    const float* values = reinterpret_cast<const float*>(x.value) + first * w.I;
    for (int64_t i = 0; i < w.I; i++)
      for (int64_t t = 0; t < count; t++) beside[i * count + t] = values[t * w.I + i];
    for (int64_t b = block; b < end; b++) {
      block_rows(w, b, beside, count, c);
      if (pairs) block_rows(w, half + b, beside, count, up);
      for (int64_t t = 0; t < count; t++)
        pairs ? finish_pair(out, first + t, b * 16, c + t * 16, up + t * 16) : finish_16(out, first + t, b * 16, c + t * 16);
    }
  }
}

}  // namespace ERNIE_ISA
}  // namespace ernie
