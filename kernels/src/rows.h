// Row-wise work around the products: norm, quantisation, conversion, and what a finished tile goes through. Plain loops that every compiler
// vectorises; included by each instruction set inside its own namespace (ERNIE_ISA), so that no symbol is shared between them.
//
// Sums run over 16 partial sums in a fixed order and no product is contracted: every instruction set gives the same bits.
#include <cmath>
#include <cstring>

#include "types.h"

namespace ernie {
namespace ERNIE_ISA {

static inline float f32_of_bf16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

static inline uint16_t bf16_of_f32(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t quiet = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

static inline float f32_of_f16(uint16_t h) {
  // exponent and mantissa moved into place, then scaled by 2^112: exact for normals and subnormals; infinities do not occur in scales
  uint32_t bits = uint32_t(h & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  return (h & 0x8000) ? -f : f;
}

static inline void load_row(const Rows& x, int64_t t, int64_t first, int n, float* out) {
  if (x.type == Type::f32) {
    std::memcpy(out, static_cast<const float*>(x.data) + t * x.stride + first, size_t(n) * 4);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + t * x.stride + first;
    for (int i = 0; i < n; i++) out[i] = f32_of_bf16(p[i]);
  }
}

// One group of float32 values to int8. Magnitudes are compared as integers, where NaN is the largest: nothing that is no number is lost.
static inline void quantise_group(const float* x, int64_t n, int8_t* value, float* scale, int32_t* sum) {
  uint32_t top = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  float largest;
  std::memcpy(&largest, &top, 4);
  if (top >= 0x7f800000 || largest < 1e-30f) {  // not finite: the whole group answers NaN; nothing there: zeros
    std::memset(value, 0, size_t(n));
    *scale = top >= 0x7f800000 ? NAN : 0.0f;
    *sum = 0;
    return;
  }
  const float inverse = 127.0f / largest, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
  int32_t total = 0;
  for (int64_t i = 0; i < n; i++) {
    float rounded = x[i] * inverse + magic;
    int32_t bits;
    std::memcpy(&bits, &rounded, 4);
    int32_t whole = bits - 0x4b400000;
    value[i] = int8_t(whole);
    total += whole;
  }
  *scale = largest / 127.0f;
  *sum = total;
}

static inline void quantise_row(float* row, int64_t width, const Quantised& q, int64_t t) {
  for (int64_t i = width; i < q.I; i++) row[i] = 0.0f;
  const int64_t group = q.I / q.G;
  for (int64_t g = 0; g < q.G; g++)
    quantise_group(row + g * group, group, q.value + t * q.I + g * group, q.scale + t * q.G + g, q.sum + t * q.G + g);
}

constexpr int64_t kWidest = 65536;  // widest input row; checked where tensors come in

[[maybe_unused]] static void quantise(const Rows& x, int64_t T, int64_t width, const Quantised& q, int64_t first) {
  static thread_local float row[kWidest];
  for (int64_t t = first; t < first + T; t++) {
    load_row(x, t, 0, int(width), row);
    quantise_row(row, width, q, t);
  }
}

static float mean_square(const float* row, int64_t width) {
  float part[16] = {0};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int j = 0; j < 16; j++) part[j] += row[i + j] * row[i + j];
  for (int j = 0; i < width; i++, j++) part[j] += row[i] * row[i];
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; j++) part[j] += part[j + half];
  return part[0] / float(width);
}

[[maybe_unused]] static void norm_quantise(const Rows& x, int64_t T, int64_t width, const void* weight, Type weight_type, float eps, const Quantised& q,
                          int64_t first) {
  static thread_local float row[kWidest], gain[kWidest];
  Rows w{weight, weight_type, 0};
  load_row(w, 0, 0, int(width), gain);
  for (int64_t t = first; t < first + T; t++) {
    load_row(x, t, 0, int(width), row);
    const float by = 1.0f / std::sqrt(mean_square(row, width) + eps);
    if (x.type == Type::f32) {
      for (int64_t i = 0; i < width; i++) row[i] = row[i] * by * gain[i];
    } else {  // the family casts back before the weight, see ops/reference.py
      for (int64_t i = 0; i < width; i++) row[i] = f32_of_bf16(bf16_of_f32(f32_of_bf16(bf16_of_f32(row[i] * by)) * gain[i]));
    }
    quantise_row(row, width, q, t);
  }
}

// exp for x <= 0 .. any: 2^n * 2^f with a degree-6 polynomial for 2^f, f in [-0.5, 0.5]; relative error below 2e-7.
static inline float exp_approx(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number, which then stands in the low bits
  const float n = shifted - 12582912.0f;
  const float f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// `n` values to `out`; sixteen of them, the usual case, with a count the compiler knows.
template <int n>
static inline void put_exactly(void* out, Type type, int64_t at, const float* c) {
  if (type == Type::f32) {
    std::memcpy(static_cast<float*>(out) + at, c, n * 4);
  } else {
    uint16_t* p = static_cast<uint16_t*>(out) + at;
    for (int i = 0; i < n; i++) p[i] = bf16_of_f32(c[i]);
  }
}

static inline void put(void* out, Type type, int64_t at, const float* c, int n) {
  if (n == 16) return put_exactly<16>(out, type, at, c);
  for (int i = 0; i < n; i++) put_exactly<1>(out, type, at + i, c + i);
}

static inline float seen_as(Type type, float x) { return type == Type::f32 ? x : f32_of_bf16(bf16_of_f32(x)); }

// 16 finished columns from `column` on, of one token.
static inline void finish_16(const Output& o, int64_t t, int64_t column, float* c) {
  int n = int(o.width - column < 16 ? o.width - column : 16);
  if (n <= 0) return;
  if (o.finish == Finish::add) {  // the product is rounded to the model's type first, as separate layers would
    float more[16] = {0};
    load_row(Rows{o.addend, o.type, o.stride}, t, column, n, more);
    if (o.type == Type::bf16)
      for (int i = 0; i < 16; i++) c[i] = seen_as(Type::bf16, c[i]);
    for (int i = 0; i < 16; i++) c[i] += more[i];
    put(o.out, o.type, t * o.stride + column, c, n);
  } else if (o.finish == Finish::rotate) {
    const int64_t head = 2 * o.pairs;
    if (column < o.rotated) {
      // pair p of a head; 16 columns never straddle a head: head sizes are multiples of 16
      const float* turn = o.turns + (t * o.pairs + (column % head) / 2) * 2;
      if (o.type == Type::bf16)
        for (int i = 0; i < 16; i++) c[i] = seen_as(Type::bf16, c[i]);
      for (int i = 0; i < 16; i += 2) {
        const float even = c[i], odd = c[i + 1], cos = turn[i], sin = turn[i + 1];
        c[i] = even * cos - odd * sin;
        c[i + 1] = odd * cos + even * sin;
      }
    }
    if (column < o.q_width) {
      put(o.out, o.type, t * o.q_width + column, c, n);
    } else if (column < o.q_width + o.kv_width) {
      put(o.k, o.type, t * o.kv_width + column - o.q_width, c, n);
    } else {
      put(o.v, o.type, t * o.kv_width + column - o.q_width - o.kv_width, c, n);
    }
  } else {
    put(o.out, o.type, t * o.stride + column, c, n);
  }
}

// 16 gate columns and the 16 up columns beside them -> 16 columns of silu(gate) * up.
static inline void finish_pair(const Output& o, int64_t t, int64_t column, const float* gate, const float* up) {
  int n = int(o.width - column < 16 ? o.width - column : 16);
  if (n <= 0) return;
  float c[16];
  if (o.type == Type::f32) {
    for (int i = 0; i < 16; i++) c[i] = gate[i] / (1.0f + exp_approx(-gate[i])) * up[i];
  } else {  // gate, up and silu(gate) rounded, as separate layers would
    for (int i = 0; i < 16; i++) {
      const float g = seen_as(Type::bf16, gate[i]), u = seen_as(Type::bf16, up[i]);
      c[i] = seen_as(Type::bf16, g / (1.0f + exp_approx(-g))) * u;
    }
  }
  put(o.out, o.type, t * o.stride + column, c, n);
}

}  // namespace ERNIE_ISA
}  // namespace ernie
