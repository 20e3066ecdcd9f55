// Integer products in plain C++: the path of machines without any of the others, and what the others are compared with.
#define ERNIE_ISA plain
#include "panel.h"

namespace ernie {
namespace plain {

struct Micro {
  static constexpr int rows_at_once = 4;
  static constexpr bool unpacks_bytes = false;

  const Packed& w;
  const Quantised& x;
  Micro(const Packed& weights, const Quantised& activations) : w(weights), x(activations) {}

  // sum over one group for 16 outputs: bytes [group/4][16][4] times values [group]
  static void dot(const uint8_t* bytes, const int8_t* values, int64_t group, int32_t* s) {
    for (int64_t q = 0; q < group / 4; q++)
      for (int r = 0; r < 16; r++)
        for (int c = 0; c < 4; c++) s[r] += int32_t(bytes[q * 64 + r * 4 + c]) * values[q * 4 + c];
  }

  static void add_group(const int32_t* s, const float* scale, float by, float* c) {
    for (int r = 0; r < 16; r++) c[r] = __builtin_fmaf(scale[r] * by, float(s[r]), c[r]);
  }

  template <int bits>
  static void unpack(const uint8_t* packed, int64_t I, uint8_t* out) {
    static_assert(bits == 4);
    for (int64_t j = 0; j < I / 8; j++)
      for (int b = 0; b < 64; b++) {
        out[j * 128 + b] = packed[j * 64 + b] & 15;
        out[j * 128 + 64 + b] = packed[j * 64 + b] >> 4;
      }
  }

  template <int bits, int T>
  static void few_block(const uint8_t* packed, const uint16_t* scale, const Quantised& x, float* c) {
    const int64_t group = x.I / x.G;
    std::memset(c, 0, sizeof(float) * 16 * T);
    uint8_t bytes[128];
    for (int64_t g = 0; g < x.G; g++) {
      int32_t s[T][16];
      float d[16];
      const V wide = f32_of_f16(scale + g * 16);
      std::memcpy(d, &wide, 64);
      for (int t = 0; t < T; t++)
        for (int r = 0; r < 16; r++) s[t][r] = (bits == 4 ? -8 : -128) * x.sum[t * x.G + g];
      for (int64_t k = 0; k < group; k += 8, packed += 16 * bits) {
        const uint8_t* p = packed;
        if (bits == 4) unpack<4>(packed, 8, bytes), p = bytes;
        for (int t = 0; t < T; t++) dot(p, x.value + t * x.I + g * group + k, 8, s[t]);
      }
      for (int t = 0; t < T; t++) add_group(s[t], d, x.scale[t * x.G + g], c + t * 16);
    }
  }

  void tiles(const uint8_t* const* value, const float* scale, int blocks, int64_t t0, int m, float* c, const uint8_t*) const {
    const int64_t group = x.I / x.G;
    for (int i = 0; i < m; i++)
      for (int b = 0; b < blocks; b++) {
        float* to = c + (i * kPanelBlocks + b) * 16;
        std::memset(to, 0, sizeof(float) * 16);
        for (int64_t g = 0; g < x.G; g++) {
          int32_t s[16];
          for (int r = 0; r < 16; r++) s[r] = (w.bits == 4 ? -8 : -128) * x.sum[(t0 + i) * x.G + g];
          dot(value[b] + g * group * 16, x.value + (t0 + i) * x.I + g * group, group, s);
          add_group(s, scale + (b * x.G + g) * 16, x.scale[(t0 + i) * x.G + g], to);
        }
      }
  }
};

}  // namespace plain

const Kernels& plain_kernels() {
  static const Kernels kernels = plain::table<plain::Micro>("plain", plain_floats(), plain_rows());
  return kernels;
}

}  // namespace ernie
