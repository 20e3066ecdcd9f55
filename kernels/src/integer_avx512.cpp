// Integer products with AVX-512 VNNI: one instruction multiplies 64 unsigned weight bytes with 64 signed activation bytes into 16 sums.
#define ERNIE_ISA avx512
#include <immintrin.h>

#include "panel.h"

namespace ernie {
namespace avx512 {

static inline __m512i quad(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// s += w . a. Written as an instruction since GCC 12 copies the sums around its own intrinsic, which halves the speed of `tile`.
static inline void dot(__m512i& s, __m512i w, __m512i a) { __asm__("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(w), "v"(a)); }

struct Micro {
  static constexpr int rows_at_once = 6;  // 6 x 4 sums, 4 weights, 1 activation: 29 of 32 registers
  static constexpr bool unpacks_bytes = false;

  const Packed& w;
  const Quantised& x;
  Micro(const Packed& weights, const Quantised& activations) : w(weights), x(activations) {}

  template <int bits>
  static void unpack(const uint8_t* packed, int64_t I, uint8_t* out) {
    static_assert(bits == 4);
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t j = 0; j < I / 8; j++) {
      const __m512i b = _mm512_loadu_si512(packed + j * 64);
      _mm_prefetch(reinterpret_cast<const char*>(packed + j * 64 + 2048), _MM_HINT_T0);
      _mm512_store_si512(out + j * 128, _mm512_and_si512(b, low));
      _mm512_store_si512(out + j * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(b, 4), low));
    }
  }

  template <int bits, int T>
  static void few_block(const uint8_t* p, const uint16_t* scale, const Quantised& x, float* c) {
    constexpr int chains = T <= 2 ? 2 : 1;  // one or two rows alone would wait for the latency of their own sums
    const __m512i low = _mm512_set1_epi8(15);
    const int64_t group = x.I / x.G;
    __m512 f[T];
    for (int t = 0; t < T; t++) f[t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < x.G; g++) {
      const int8_t* a = x.value + g * group;
      __m512i s[T][2];
      for (int t = 0; t < T; t++) {
        s[t][0] = _mm512_set1_epi32((bits == 4 ? -8 : -128) * x.sum[t * x.G + g]);
        s[t][1] = _mm512_setzero_si512();
      }
      _mm_prefetch(reinterpret_cast<const char*>(scale + g * 16) + 1024, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int64_t k = 0; k < group; k += 8, p += 16 * bits) {
        _mm_prefetch(reinterpret_cast<const char*>(p) + 4096, _MM_HINT_T0);
        __m512i first = _mm512_loadu_si512(p), second;
        if (bits == 4) {
          second = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
          first = _mm512_and_si512(first, low);
        } else {
          _mm_prefetch(reinterpret_cast<const char*>(p) + 4096 + 64, _MM_HINT_T0);
          second = _mm512_loadu_si512(p + 64);
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
          dot(s[t][0], first, quad(a + t * x.I + k));
          dot(s[t][chains - 1], second, quad(a + t * x.I + k + 4));
        }
      }
      const __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale + g * 16)));
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        const __m512i whole = chains == 2 ? _mm512_add_epi32(s[t][0], s[t][1]) : s[t][0];
        f[t] = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(x.scale[t * x.G + g])), _mm512_cvtepi32_ps(whole), f[t]);
      }
    }
    for (int t = 0; t < T; t++) _mm512_store_ps(c + t * 16, f[t]);
  }

  template <int M, int B>
  void tile(const uint8_t* const* value, const float* scale, int64_t t0, float* c) const {
    const int64_t group = x.I / x.G;
    const int32_t offset = w.bits == 4 ? -8 : -128;
    for (int i = 0; i < M; i++)
      for (int b = 0; b < B; b++) _mm512_store_ps(c + (i * kPanelBlocks + b) * 16, _mm512_setzero_ps());
    for (int64_t g = 0; g < x.G; g++) {
      __m512i s[M][B];
#pragma GCC unroll 6
      for (int i = 0; i < M; i++) {
        const __m512i start = _mm512_set1_epi32(offset * x.sum[(t0 + i) * x.G + g]);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) s[i][b] = start;
      }
      const int8_t* a = x.value + t0 * x.I + g * group;
      const int64_t at = g * group * 16;
      for (int64_t k = 0; k < group; k += 4) {
        __m512i v[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) v[b] = _mm512_loadu_si512(value[b] + at + k * 16);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
          const __m512i q = quad(a + i * x.I + k);
#pragma GCC unroll 4
          for (int b = 0; b < B; b++) dot(s[i][b], v[b], q);
        }
      }
      __m512 d[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; b++) d[b] = _mm512_loadu_ps(scale + (b * x.G + g) * 16);
#pragma GCC unroll 6
      for (int i = 0; i < M; i++) {
        const __m512 by = _mm512_set1_ps(x.scale[(t0 + i) * x.G + g]);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
          float* to = c + (i * kPanelBlocks + b) * 16;
          _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_mul_ps(d[b], by), _mm512_cvtepi32_ps(s[i][b]), _mm512_load_ps(to)));
        }
      }
    }
  }

  template <int B>
  void rows(const uint8_t* const* value, const float* scale, int64_t t0, int m, float* c) const {
    switch (m) {
      case 1: return tile<1, B>(value, scale, t0, c);
      case 2: return tile<2, B>(value, scale, t0, c);
      case 3: return tile<3, B>(value, scale, t0, c);
      case 4: return tile<4, B>(value, scale, t0, c);
      case 5: return tile<5, B>(value, scale, t0, c);
      default: return tile<6, B>(value, scale, t0, c);
    }
  }

  void tiles(const uint8_t* const* value, const float* scale, int blocks, int64_t t0, int m, float* c, const uint8_t*) const {
    if (blocks == 4) return rows<4>(value, scale, t0, m, c);
    for (int b = 0; b < blocks; b++) rows<1>(value + b, scale + b * x.G * 16, t0, m, c + b * 16);
  }
};

}  // namespace avx512

const Kernels& avx512_kernels() {
  static const Kernels kernels = avx512::table<avx512::Micro>("avx512", avx512_floats(), avx512_rows());
  return kernels;
}

}  // namespace ernie
