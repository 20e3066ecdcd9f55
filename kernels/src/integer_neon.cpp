// Integer products with NEON's dot product: one instruction multiplies 16 signed bytes with 16 signed bytes into 4 sums. Weights are stored
// unsigned: nibbles are read as the small positive numbers they are and their offset is taken back from the sum of the activations; bytes
// lose their offset of 128 by turning the highest bit.
#define ERNIE_ISA neon
#include <arm_neon.h>

#include "panel.h"

namespace ernie {
namespace neon {

static inline int8x16_t bytes_at(const uint8_t* p) { return vreinterpretq_s8_u8(vld1q_u8(p)); }
static inline int8x16_t without_offset(const uint8_t* p) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(128))); }

static inline void add_group(const int32x4_t* s, const float* d, float by, float* c) {
  for (int h = 0; h < 4; h++) {
    const float32x4_t scaled = vmulq_n_f32(vld1q_f32(d + h * 4), by);
    vst1q_f32(c + h * 4, vfmaq_f32(vld1q_f32(c + h * 4), scaled, vcvtq_f32_s32(s[h])));
  }
}

struct Micro {
  static constexpr int rows_at_once = 4;  // 4 x 4 sums, 4 weights, 4 activations: 24 of 32 registers
  static constexpr bool unpacks_bytes = true;

  const Packed& w;
  const Quantised& x;
  Micro(const Packed& weights, const Quantised& activations) : w(weights), x(activations) {}

  template <int bits>
  static void unpack(const uint8_t* packed, int64_t I, uint8_t* out) {
    if (bits == 8) {
      for (int64_t j = 0; j < I * 16; j += 16) vst1q_s8(reinterpret_cast<int8_t*>(out + j), without_offset(packed + j));
      return;
    }
    for (int64_t j = 0; j < I / 8; j++)
      for (int64_t h = 0; h < 64; h += 16) {
        const uint8x16_t b = vld1q_u8(packed + j * 64 + h);
        vst1q_u8(out + j * 128 + h, vandq_u8(b, vdupq_n_u8(15)));
        vst1q_u8(out + j * 128 + 64 + h, vshrq_n_u8(b, 4));
      }
  }

  template <int bits, int T>
  static void few_block(const uint8_t* p, const uint16_t* scale, const Quantised& x, float* c) {
    const int64_t group = x.I / x.G;
    std::memset(c, 0, sizeof(float) * 16 * T);
    for (int64_t g = 0; g < x.G; g++) {
      const int8_t* a = x.value + g * group;
      int32x4_t s[T][4];
      for (int t = 0; t < T; t++)
        for (int h = 0; h < 4; h++) s[t][h] = vdupq_n_s32(bits == 4 ? -8 * x.sum[t * x.G + g] : 0);
      for (int64_t k = 0; k < group; k += 8, p += 16 * bits) {
        __builtin_prefetch(p + 2048);
#pragma GCC unroll 4
        for (int h = 0; h < 4; h++) {
          int8x16_t first, second;
          if (bits == 4) {
            const uint8x16_t both = vld1q_u8(p + h * 16);
            first = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
            second = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
          } else {
            first = without_offset(p + h * 16);
            second = without_offset(p + 64 + h * 16);
          }
#pragma GCC unroll 8
          for (int t = 0; t < T; t++) {
            const int8x8_t eight = vld1_s8(a + t * x.I + k);
            s[t][h] = vdotq_lane_s32(vdotq_lane_s32(s[t][h], first, eight, 0), second, eight, 1);
          }
        }
      }
      const V wide = f32_of_f16(scale + g * 16);
      float d[16];
      std::memcpy(d, &wide, 64);
      for (int t = 0; t < T; t++) add_group(s[t], d, x.scale[t * x.G + g], c + t * 16);
    }
  }

  // the four inputs from `quarter` on of 16, for M rows
  template <int quarter, int M>
  static inline void four_inputs(const uint8_t* value, const int8x16_t* a, int32x4_t (*s)[4]) {
#pragma GCC unroll 4
    for (int h = 0; h < 4; h++) {
      const int8x16_t v = bytes_at(value + quarter * 64 + h * 16);
#pragma GCC unroll 4
      for (int i = 0; i < M; i++) s[i][h] = vdotq_laneq_s32(s[i][h], v, a[i], quarter);
    }
  }

  template <int M>
  void tile(const uint8_t* value, const float* scale, int64_t t0, float* c) const {
    const int64_t group = x.I / x.G;
    for (int i = 0; i < M; i++) std::memset(c + i * kPanelBlocks * 16, 0, 64);
    for (int64_t g = 0; g < x.G; g++) {
      int32x4_t s[M][4];
      for (int i = 0; i < M; i++)
        for (int h = 0; h < 4; h++) s[i][h] = vdupq_n_s32(w.bits == 4 ? -8 * x.sum[(t0 + i) * x.G + g] : 0);
      for (int64_t k = g * group; k < (g + 1) * group; k += 16) {
        int8x16_t a[M];
        for (int i = 0; i < M; i++) a[i] = vld1q_s8(x.value + (t0 + i) * x.I + k);
        four_inputs<0, M>(value + k * 16, a, s);
        four_inputs<1, M>(value + k * 16, a, s);
        four_inputs<2, M>(value + k * 16, a, s);
        four_inputs<3, M>(value + k * 16, a, s);
      }
      for (int i = 0; i < M; i++) add_group(s[i], scale + g * 16, x.scale[(t0 + i) * x.G + g], c + i * kPanelBlocks * 16);
    }
  }

  void tiles(const uint8_t* const* value, const float* scale, int blocks, int64_t t0, int m, float* c, const uint8_t*) const {
    for (int b = 0; b < blocks; b++) {
      const float* s = scale + b * x.G * 16;
      float* to = c + b * 16;
      switch (m) {
        case 1: tile<1>(value[b], s, t0, to); break;
        case 2: tile<2>(value[b], s, t0, to); break;
        case 3: tile<3>(value[b], s, t0, to); break;
        default: tile<4>(value[b], s, t0, to);
      }
    }
  }
};

}  // namespace neon

const Kernels& neon_kernels() {
  static const Kernels kernels = neon::table<neon::Micro>("neon", neon_floats(), neon_rows());
  return kernels;
}

}  // namespace ernie
