// Integer products with vectors of 32 bytes, compiled twice (ERNIE_ISA): as `avx2`, and as `avx_vnni` for processors with VNNI and without
// AVX-512, which most desktops and laptops of the last years are.
//
// Without VNNI there is no exact byte product: `maddubs` adds two products in 16 bits, which holds for nibbles (2 * 15 * 127 < 32768) and not
// for bytes. Bytes are widened to 16 bits first, at half the speed.
#include <immintrin.h>

#include "panel.h"

namespace ernie {
namespace ERNIE_ISA {

static inline __m256i quad(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// sums of four products, 8 outputs: unsigned weights times signed activations
template <int bits>
static inline __m256i dot(__m256i s, __m256i w, __m256i a) {
#ifdef __AVXVNNI__
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(s) : "x"(w), "x"(a));  // not its intrinsic: see integer_avx512.cpp
  return s;
#else
  const __m256i ones = _mm256_set1_epi16(1);
  if (bits == 4) return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), ones));
  const __m256i even_w = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd_w = _mm256_srli_epi16(w, 8);
  const __m256i even_a = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), odd_a = _mm256_srai_epi16(a, 8);
  return _mm256_add_epi32(s, _mm256_add_epi32(_mm256_madd_epi16(even_w, even_a), _mm256_madd_epi16(odd_w, odd_a)));
#endif
}

static inline void add_group(const __m256i* s, const __m256* d, float by, float* c) {
  for (int h = 0; h < 2; h++) {
    const __m256 scaled = _mm256_mul_ps(d[h], _mm256_set1_ps(by));
    _mm256_storeu_ps(c + h * 8, _mm256_fmadd_ps(scaled, _mm256_cvtepi32_ps(s[h]), _mm256_loadu_ps(c + h * 8)));
  }
}

struct Micro {
#ifdef __AVXVNNI__
  static constexpr int rows_at_once = 6;  // 6 x 2 sums, 2 weights, 1 activation: 15 of 16 registers
#else
  static constexpr int rows_at_once = 4;  // the product itself needs registers
#endif
  static constexpr bool unpacks_bytes = false;

  const Packed& w;
  const Quantised& x;
  Micro(const Packed& weights, const Quantised& activations) : w(weights), x(activations) {}

  template <int bits>
  static void unpack(const uint8_t* packed, int64_t I, uint8_t* out) {
    static_assert(bits == 4);
    const __m256i low = _mm256_set1_epi8(15);
    for (int64_t j = 0; j < I / 4; j++) {  // 32 packed bytes: half of the 16 rows
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + j * 32));
      uint8_t* to = out + (j / 2) * 128 + (j % 2) * 32;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_and_si256(b, low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64), _mm256_and_si256(_mm256_srli_epi16(b, 4), low));
    }
  }

  template <int bits, int T>
  static void few_block(const uint8_t* p, const uint16_t* scale, const Quantised& x, float* c) {
    const __m256i low = _mm256_set1_epi8(15);
    const int64_t group = x.I / x.G;
    std::memset(c, 0, sizeof(float) * 16 * T);
    for (int64_t g = 0; g < x.G; g++) {
      const int8_t* a = x.value + g * group;
      __m256i s[T][2];
      for (int t = 0; t < T; t++) s[t][0] = s[t][1] = _mm256_set1_epi32((bits == 4 ? -8 : -128) * x.sum[t * x.G + g]);
      for (int64_t k = 0; k < group; k += 8, p += 16 * bits) {
        _mm_prefetch(reinterpret_cast<const char*>(p) + 4096, _MM_HINT_T0);
        if (bits == 8) _mm_prefetch(reinterpret_cast<const char*>(p) + 4096 + 64, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
          __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + h * 32)), second;
          if (bits == 4) {
            second = _mm256_and_si256(_mm256_srli_epi16(first, 4), low);
            first = _mm256_and_si256(first, low);
          } else {
            second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64 + h * 32));
          }
#pragma GCC unroll 8
          for (int t = 0; t < T; t++) {
            s[t][h] = dot<bits>(s[t][h], first, quad(a + t * x.I + k));
            s[t][h] = dot<bits>(s[t][h], second, quad(a + t * x.I + k + 4));
          }
        }
      }
      __m256 d[2];
      for (int h = 0; h < 2; h++) d[h] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + g * 16 + h * 8)));
      for (int t = 0; t < T; t++) add_group(s[t], d, x.scale[t * x.G + g], c + t * 16);
    }
  }

  template <int bits, int M>
  void tile(const uint8_t* value, const float* scale, int64_t t0, float* c) const {
    const int64_t group = x.I / x.G;
    for (int i = 0; i < M; i++) std::memset(c + i * kPanelBlocks * 16, 0, 64);
    for (int64_t g = 0; g < x.G; g++) {
      __m256i s[M][2];
      for (int i = 0; i < M; i++) s[i][0] = s[i][1] = _mm256_set1_epi32((bits == 4 ? -8 : -128) * x.sum[(t0 + i) * x.G + g]);
      for (int64_t k = g * group; k < (g + 1) * group; k += 4) {
        const __m256i v0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + k * 16));
        const __m256i v1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + k * 16 + 32));
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) {
          const __m256i a = quad(x.value + (t0 + i) * x.I + k);
          s[i][0] = dot<bits>(s[i][0], v0, a);
          s[i][1] = dot<bits>(s[i][1], v1, a);
        }
      }
      const __m256 d[2] = {_mm256_loadu_ps(scale + g * 16), _mm256_loadu_ps(scale + g * 16 + 8)};
      for (int i = 0; i < M; i++) add_group(s[i], d, x.scale[(t0 + i) * x.G + g], c + i * kPanelBlocks * 16);
    }
  }

  template <int bits>
  void rows(const uint8_t* value, const float* scale, int64_t t0, int m, float* c) const {
    switch (m) {
      case 1: return tile<bits, 1>(value, scale, t0, c);
      case 2: return tile<bits, 2>(value, scale, t0, c);
      case 3: return tile<bits, 3>(value, scale, t0, c);
      case 4: return tile<bits, 4>(value, scale, t0, c);
      case 5: return tile<bits, rows_at_once < 5 ? 4 : 5>(value, scale, t0, c);
      default: return tile<bits, rows_at_once>(value, scale, t0, c);
    }
  }

  void tiles(const uint8_t* const* value, const float* scale, int blocks, int64_t t0, int m, float* c, const uint8_t*) const {
    for (int b = 0; b < blocks; b++) {
      const float* s = scale + b * x.G * 16;
      w.bits == 4 ? rows<4>(value[b], s, t0, m, c + b * 16) : rows<8>(value[b], s, t0, m, c + b * 16);
    }
  }
};

}  // namespace ERNIE_ISA

#ifdef __AVXVNNI__
const Kernels& avx_vnni_kernels() {
  static const Kernels kernels = avx_vnni::table<avx_vnni::Micro>("avx_vnni", avx2_floats(), avx2_rows());
  return kernels;
}
#else
const Kernels& avx2_kernels() {
  static const Kernels kernels = avx2::table<avx2::Micro>("avx2", avx2_floats(), avx2_rows());
  return kernels;
}
#endif

}  // namespace ernie
