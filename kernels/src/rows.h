// Row-wise work around the products: norm, quantisation, conversion, and what a finished tile goes through. Written with the compiler's own
// vectors of 16 lanes, which every instruction set cuts to its size; included by each inside its own namespace (ERNIE_ISA), so that no symbol
// is shared between them.
//
// Sums run over 16 partial sums in a fixed order and no product is contracted here: every instruction set gives the same bits.
#include <cmath>
#include <cstring>

#include "types.h"

namespace ernie {
namespace ERNIE_ISA {

using V = float __attribute__((vector_size(64), may_alias, aligned(4)));
using U = uint32_t __attribute__((vector_size(64), may_alias, aligned(4)));
using I = int32_t __attribute__((vector_size(64), may_alias, aligned(4)));
using H16 = uint16_t __attribute__((vector_size(32), may_alias, aligned(2)));
using B16 = int8_t __attribute__((vector_size(16), may_alias, aligned(1)));

static inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
static inline V widened(H16 h) { return reinterpret_cast<V>(__builtin_convertvector(h, U) << 16); }
static inline V load(const uint16_t* p) { return widened(*reinterpret_cast<const H16*>(p)); }

static inline H16 narrowed(V v) {  // to bfloat16, to nearest, ties to even; NaN stays NaN
  const U bits = reinterpret_cast<U>(v);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U result = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
  return __builtin_convertvector(result, H16);
}
static inline V rounded(Type type, V v) { return type == Type::f32 ? v : widened(narrowed(v)); }

static inline float f32_of_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

static inline V f32_of_f16(const uint16_t* p) {
  // exponent and mantissa moved into place, then scaled by 2^112: exact for normals and subnormals; infinities do not occur in scales
  const U h = __builtin_convertvector(*reinterpret_cast<const H16*>(p), U);
  const V magnitude = reinterpret_cast<V>((h & 0x7fff) << 13) * 0x1p112f;
  return reinterpret_cast<V>(reinterpret_cast<U>(magnitude) | (h & 0x8000) << 16);
}

// Up to 16 values at `at`; what lies beyond `n` is neither read nor written.
static inline V get(const void* from, Type type, int64_t at, int n) {
  if (type == Type::f32) {
    const float* p = static_cast<const float*>(from) + at;
    if (n >= 16) return load(p);
    float c[16] = {0};
    std::memcpy(c, p, size_t(n) * 4);
    return load(c);
  }
  const uint16_t* p = static_cast<const uint16_t*>(from) + at;
  if (n >= 16) return load(p);
  uint16_t c[16] = {0};
  std::memcpy(c, p, size_t(n) * 2);
  return load(c);
}

static inline void put(void* out, Type type, int64_t at, V v, int n) {
  if (type == Type::f32) {
    std::memcpy(static_cast<float*>(out) + at, &v, n >= 16 ? 64 : size_t(n) * 4);
  } else {
    const H16 h = narrowed(v);
    std::memcpy(static_cast<uint16_t*>(out) + at, &h, n >= 16 ? 32 : size_t(n) * 2);
  }
}

static inline float total(V v) {
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; j++) v[j] += v[j + half];
  return v[0];
}

// A row to float32; `out` holds width rounded up to 16, filled with zeros.
static inline void load_row(const Rows& x, int64_t t, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const V v = get(x.data, x.type, t * x.stride + i, int(width - i < 16 ? width - i : 16));
    std::memcpy(out + i, &v, 64);
  }
}

// One group of float32 values to int8, n a multiple of 16. Magnitudes are compared as integers, where NaN is the largest: nothing that is no
// number is lost.
static inline void quantise_group(const float* x, int64_t n, int8_t* value, float* scale, int32_t* sum) {
  I most = {};
  for (int64_t i = 0; i < n; i += 16) {
    const I bits = reinterpret_cast<I>(load(x + i)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t top = 0;
  for (int j = 0; j < 16; j++) top = most[j] > top ? most[j] : top;
  float largest;
  std::memcpy(&largest, &top, 4);
  if (top >= 0x7f800000 || largest < 1e-30f) {  // not finite: the whole group answers NaN; nothing there: zeros
    std::memset(value, 0, size_t(n));
    *scale = top >= 0x7f800000 ? NAN : 0.0f;
    *sum = 0;
    return;
  }
  const float inverse = 127.0f / largest;
  I totals = {};
  for (int64_t i = 0; i < n; i += 16) {
    const V shifted = load(x + i) * inverse + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
    const I whole = reinterpret_cast<I>(shifted) - 0x4b400000;
    const B16 bytes = __builtin_convertvector(whole, B16);
    std::memcpy(value + i, &bytes, 16);
    totals += whole;
  }
  *scale = largest / 127.0f;
  *sum = 0;
  for (int j = 0; j < 16; j++) *sum += totals[j];
}

// 16 lanes turned by the Hadamard matrix of 16, not scaled: sums and differences of lanes 1, 2, 4 and 8 apart.
static inline V hadamard_16(V v) {
  constexpr V sign1 = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1}, sign2 = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  constexpr V sign4 = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1}, sign8 = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) + v * sign1;
  v = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) + v * sign2;
  v = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) + v * sign4;
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) + v * sign8;
}

// A row turned in place: every 64 values, or every 32 where groups have 32, by the orthogonal Hadamard matrix.
static inline void hadamard_row(float* row, int64_t n, int64_t group) {
  const int64_t parts = group % 64 == 0 ? 4 : 2;
  const float by = parts == 4 ? 0.125f : 0.17677669529663687f;  // 1 / sqrt(16 * parts)
  for (int64_t i = 0; i < n; i += 16 * parts) {
    V v[4];
    for (int64_t p = 0; p < parts; p++) v[p] = hadamard_16(load(row + i + 16 * p));
    for (int64_t step = 1; step < parts; step *= 2)
      for (int64_t p = 0; p < parts; p++)
        if (!(p & step)) {
          const V a = v[p], b = v[p + step];
          v[p] = a + b, v[p + step] = a - b;
        }
    for (int64_t p = 0; p < parts; p++) {
      v[p] *= by;
      std::memcpy(row + i + 16 * p, &v[p], 64);
    }
  }
}

// A row of q.I values as the bfloat16 ones that add up to them, part after part. Parts are cut off, not rounded: what is left is then exact, and
// never overflows; of a bfloat16 value nothing is left.
static inline void halve_row(float* row, const Quantised& q, int64_t t) {
  auto* to = reinterpret_cast<uint16_t*>(q.value + t * q.row_bytes());
  for (int64_t i = 0; i < q.I; i += 16) {
    V left = load(row + i);
    for (int p = 0; p < q.halves; p++) {
      const U bits = reinterpret_cast<U>(left);
      const H16 part = __builtin_convertvector(bits >> 16, H16);
      std::memcpy(to + p * q.I + i, &part, 32);
      const V rest = left - reinterpret_cast<V>(bits & 0xffff0000u);
      left = rest == rest ? rest : V{};  // behind an infinity nothing is left
    }
  }
}

// `row` holds `width` values, then zeros up to a multiple of 16; the rest of the last group is filled up.
static inline void quantise_row(float* row, int64_t width, const Quantised& q, int64_t t) {
  for (int64_t i = (width + 15) / 16 * 16; i < q.I; i++) row[i] = 0.0f;
  const int64_t group = q.I / q.G;
  if (q.hadamard) hadamard_row(row, q.I, group);
  if (q.halves) return halve_row(row, q, t);
  if (q.floats) {
    std::memcpy(q.value + t * q.row_bytes(), row, size_t(q.row_bytes()));
    return;
  }
  for (int64_t g = 0; g < q.G; g++)
    quantise_group(row + g * group, group, q.value + t * q.I + g * group, q.scale + t * q.G + g, q.sum + t * q.G + g);
}

constexpr int64_t kWidest = 65536;  // widest input row; checked where tensors come in

[[maybe_unused]] static void quantise(const Rows& x, int64_t T, int64_t width, const Quantised& q, int64_t first) {
  static thread_local float row[kWidest];
  for (int64_t t = first; t < first + T; t++) {
    load_row(x, t, width, row);
    quantise_row(row, width, q, t);
  }
}

[[maybe_unused]] static void norm_quantise(const Rows& x, int64_t T, int64_t width, const void* weight, Type weight_type, float eps,
                                           const Quantised& q, int64_t first) {
  static thread_local float row[kWidest], gain[kWidest];
  load_row(Rows{weight, weight_type, 0}, 0, width, gain);
  for (int64_t t = first; t < first + T; t++) {
    load_row(x, t, width, row);
    V squares = {};
    for (int64_t i = 0; i < width; i += 16) squares += load(row + i) * load(row + i);
    const float by = 1.0f / std::sqrt(total(squares) / float(width) + eps);
    for (int64_t i = 0; i < width; i += 16) {  // the family casts back before the weight, see ops/reference.py
      const V v = rounded(x.type, rounded(x.type, load(row + i) * by) * load(gain + i));
      std::memcpy(row + i, &v, 64);
    }
    quantise_row(row, width, q, t);
  }
}

// exp: 2^n * e^f with f in [-ln 2 / 2, ln 2 / 2] and a polynomial of degree 6; relative error below 2e-7.
static inline V exp_approx(V x) {
  x = x < -87.0f ? V{} - 87.0f : x;
  x = x > 88.0f ? V{} + 88.0f : x;
  const V shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number, which then stands in the low bits
  const V n = shifted - 12582912.0f;
  const V f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = V{} + 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const U power = (reinterpret_cast<U>(shifted) - 0x4b400000u + 127u) << 23;
  return p * reinterpret_cast<V>(power);
}

// Adjacent pairs turn: turn[2p] is the cosine and turn[2p + 1] the sine of pair p.
static inline V turned(const float* turn, V c) {
  const V t = load(turn), swapped = __builtin_shufflevector(c, c, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  const V cos = __builtin_shufflevector(t, t, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
  const V sin = __builtin_shufflevector(-t, t, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  return c * cos + swapped * sin;
}

// 16 finished columns from `column` on, of one token.
static inline void finish_16(const Output& o, int64_t t, int64_t column, const float* from) {
  const int n = int(o.width - column < 16 ? o.width - column : 16);
  if (n <= 0) return;
  V c = load(from);
  if (o.finish == Finish::add) {  // the product is rounded to the model's type first, as separate layers would
    c = rounded(o.type, c) + get(o.addend, o.type, t * o.stride + column, n);
  } else if (o.finish == Finish::rotate) {
    // 16 columns never straddle a head: head sizes are multiples of 16
    if (column < o.rotated) c = turned(o.turns + (t * o.pairs + (column % (2 * o.pairs)) / 2) * 2, rounded(o.type, c));
    if (column < o.q_width) return put(o.out, o.type, t * o.q_width + column, c, n);
    const int64_t row = (o.slots ? o.slots[t] : t) * o.kv_width;
    if (column < o.q_width + o.kv_width) return put(o.k, o.type, row + column - o.q_width, c, n);
    return put(o.v, o.type, row + column - o.q_width - o.kv_width, c, n);
  } else if (o.finish == Finish::logits) {
    return put(o.out, Type::f32, t * o.stride + column, rounded(o.type, c), n);
  }
  put(o.out, o.type, t * o.stride + column, c, n);
}

// 16 gate columns and the 16 up columns beside them -> 16 columns of silu(gate) * up; gate, up and silu(gate) rounded to the model's type,
// as separate layers would.
static inline void finish_pair(const Output& o, int64_t t, int64_t column, const float* gate, const float* up) {
  const int n = int(o.width - column < 16 ? o.width - column : 16);
  if (n <= 0) return;
  const V g = rounded(o.type, load(gate)), u = rounded(o.type, load(up));
  put(o.out, o.type, t * o.stride + column, rounded(o.type, g / (1.0f + exp_approx(-g))) * u, n);
}

}  // namespace ERNIE_ISA
}  // namespace ernie
