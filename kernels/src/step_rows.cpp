// Row work of a whole step that stands in no product: embedding, norm, the choice of experts and their sum, the best logit. Written with the
// compiler's vector types and compiled once per instruction set (ERNIE_ISA); sums run in a fixed order, so all give the same bits.
#include "rows.h"

namespace ernie {
namespace ERNIE_ISA {

void adamw(const AdamwJob& job, int64_t first, int64_t end);  // adamw.cpp

static void embed(const Packed& w, int64_t token, int64_t width, Type type, void* out) {
  if (w.whole()) {
    for (int64_t i = 0; i < width; i += 16) {
      const int n = int(width - i < 16 ? width - i : 16);
      put(out, type, i, get(w.value, Type::bf16, token * w.I + i, n), n);
    }
    return;
  }
  const uint8_t* value = w.value + token / 16 * w.block_bytes() + token % 16 * 4;
  const uint16_t* scale = w.scale + token / 16 * w.G * 16 + token % 16;
  const int64_t group = w.group();
  const float offset = w.bits == 4 ? 8.0f : 128.0f;
  static thread_local float wide[kWidest];
  for (int64_t i = 0; i < w.I; i += 16) {
    uint16_t sixteen[16] = {scale[i / group * 16]};  // groups are multiples of 32
    const float by = f32_of_f16(sixteen)[0];
    for (int64_t at = i; at < i + 16; at++) {
      const int whole = w.bits == 8 ? value[at / 4 * 64 + at % 4] : value[at / 8 * 64 + at % 4] >> (at % 8 / 4 * 4) & 15;
      wide[at] = (float(whole) - offset) * by;
    }
  }
  if (w.hadamard) hadamard_row(wide, w.I, group);  // its own inverse
  for (int64_t i = 0; i < width; i += 16) put(out, type, i, load(wide + i), int(width - i < 16 ? width - i : 16));
}

static void norm(const Rows& x, int64_t t, int64_t width, const void* weight, float eps, void* out) {
  const int64_t at = t * x.stride;
  V squares = {};
  for (int64_t i = 0; i < width; i += 16) {
    const V v = get(x.data, x.type, at + i, int(width - i < 16 ? width - i : 16));
    squares += v * v;
  }
  const float by = 1.0f / std::sqrt(total(squares) / float(width) + eps);
  for (int64_t i = 0; i < width; i += 16) {
    const int n = int(width - i < 16 ? width - i : 16);
    put(out, x.type, i, rounded(x.type, get(x.data, x.type, at + i, n) * by) * get(weight, x.type, i, n), n);
  }
}

static void rotate(const Rows& x, int64_t t, int64_t width, int64_t pairs, const float* turns, void* out) {
  for (int64_t i = 0; i < width; i += 16) put(out, x.type, i, turned(turns + i % (2 * pairs), get(x.data, x.type, t * x.stride + i, 16)), 16);
}

static void swiglu(const Rows& x, int64_t t, int64_t width, void* out) {
  for (int64_t i = 0; i < width; i += 16) {
    const int n = int(width - i < 16 ? width - i : 16);
    const V g = get(x.data, x.type, t * x.stride + i, n), u = get(x.data, x.type, t * x.stride + width + i, n);
    put(out, x.type, i, rounded(x.type, g / (1.0f + exp_approx(-g))) * u, n);
  }
}

static void scores(const Rows& x, int64_t T, int64_t D, const float* weight, int64_t first, int64_t end, float* out, int64_t E) {
  for (int64_t t = 0; t < T; t++)
    for (int64_t e = first; e < end; e += 4) {
      const int n = int(end - e < 4 ? end - e : 4);
      V sum[4] = {};
      int64_t i = 0;
      for (; i + 16 <= D; i += 16) {
        const V v = get(x.data, x.type, t * x.stride + i, 16);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[j] += v * load(weight + (e + (j < n ? j : 0)) * D + i);
      }
      if (i < D) {
        const V v = get(x.data, x.type, t * x.stride + i, int(D - i));
        for (int j = 0; j < n; j++) sum[j] += v * get(weight, Type::f32, (e + j) * D + i, int(D - i));
      }
      for (int j = 0; j < n; j++) out[t * E + e + j] = total(sum[j]);
    }
}

static void choose(float* scores, const float* bias, int64_t E, int64_t top_k, float norm_min, int32_t* ids, float* weights) {
  float top = scores[0], sum = 0.0f;
  for (int64_t e = 1; e < E; e++) top = scores[e] > top ? scores[e] : top;
  for (int64_t e = 0; e < E; e++) {
    scores[e] = exp_approx(V{} + (scores[e] - top))[0];
    sum += scores[e];
  }
  float chosen = 0.0f;
  for (int64_t e = 0; e < E; e++) scores[e] /= sum;
  for (int64_t c = 0; c < top_k; c++) {
    int32_t place = -1;
    float most = 0.0f;
    for (int64_t e = 0; e < E; e++) {
      bool taken = false;
      for (int64_t b = 0; b < c; b++) taken |= ids[b] == e;
      const float biased = scores[e] + bias[e];
      if (!taken && (place < 0 || biased > most)) place = int32_t(e), most = biased;
    }
    ids[c] = place;
    weights[c] = scores[place];
    chosen += scores[place];
  }
  for (int64_t c = 0; c < top_k; c++) weights[c] /= chosen < norm_min ? norm_min : chosen;
}

// Every sum is rounded to the model's type, as separate layers would; the experts in ascending order.
static void mix(const Mixture& m, void* out) {
  for (int64_t i = 0; i < m.D; i += 16) {
    const int n = int(m.D - i < 16 ? m.D - i : 16);
    V sum = {};
    for (int64_t c = 0; c < m.count; c++) {
      const V weight = rounded(m.type, V{} + m.weights[m.places[c]]);
      sum = rounded(m.type, sum + rounded(m.type, get(m.rows, m.type, m.places[c] * m.D + i, n) * weight));
    }
    if (m.shared) sum = rounded(m.type, sum + get(m.shared, m.type, i, n));
    put(out, m.type, i, get(m.residual, m.type, i, n) + sum, n);
  }
}

static void best(const float* logits, int64_t n, int64_t* place, float* value) {
  V most = V{} - INFINITY;
  I strange = {};  // lanes that met something that is no number
  for (int64_t i = 0; i < n; i += 16) {
    const int count = int(n - i < 16 ? n - i : 16);
    V v = get(logits, Type::f32, i, count);
    if (count < 16) {
      for (int j = count; j < 16; j++) v[j] = -INFINITY;
    }
    strange |= v != v;
    most = v > most ? v : most;
  }
  float top = most[0];
  bool sound = true;
  for (int j = 0; j < 16; j++) top = most[j] > top ? most[j] : top, sound &= !strange[j];
  *value = sound ? top : NAN;
  *place = 0;
  if (!sound) return;
  for (int64_t i = 0; i < n; i++)
    if (logits[i] == top) {
      *place = i;
      return;
    }
}

}  // namespace ERNIE_ISA

#define ERNIE_JOIN2(a, b) a##b
#define ERNIE_JOIN(a, b) ERNIE_JOIN2(a, b)
const RowKernels& ERNIE_JOIN(ERNIE_ISA, _rows)() {
  static const RowKernels kernels{ERNIE_ISA::embed, ERNIE_ISA::norm, ERNIE_ISA::rotate, ERNIE_ISA::swiglu, ERNIE_ISA::scores, ERNIE_ISA::choose, ERNIE_ISA::mix, ERNIE_ISA::best, ERNIE_ISA::adamw};
  return kernels;
}

}  // namespace ernie
