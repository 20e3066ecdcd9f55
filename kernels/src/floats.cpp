// Products with bfloat16 weights, and attention over pages. Written with the compiler's vector types and compiled once per instruction set
// (ERNIE_ISA), products contracted to fused ones; sums are float32.
#include "rows.h"

namespace ernie {
namespace ERNIE_ISA {

using V = float __attribute__((vector_size(64), may_alias, aligned(4)));
using U = uint32_t __attribute__((vector_size(64), may_alias, aligned(4)));
using H16 = uint16_t __attribute__((vector_size(32), may_alias, aligned(2)));

static inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
static inline V load(const uint16_t* p) {
  return reinterpret_cast<V>(__builtin_convertvector(*reinterpret_cast<const H16*>(p), U) << 16);
}
static inline float total(V v) {
  float s[16];
  std::memcpy(s, &v, 64);
  for (int half = 8; half; half /= 2)
    for (int j = 0; j < half; j++) s[j] += s[j + half];
  return s[0];
}

static void widen(const Rows& x, int64_t T, int64_t width, float* out) {
  for (int64_t t = 0; t < T; t++)
    for (int64_t i = 0; i < width; i += 4096) {
      int n = int(width - i < 4096 ? width - i : 4096);
      load_row(x, t, i, n, out + t * width + i);
    }
}

// R rows of the weight times T rows of x -> c[R][T]
template <int R, int T>
static inline void dots(const uint16_t* w, int64_t I, const float* x, float* c) {
  V s[R][T] = {};
  int64_t i = 0;
  for (; i + 16 <= I; i += 16) {
    V v[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      if ((i & 16) == 0) __builtin_prefetch(w + r * I + i + 1024);
      v[r] = load(w + r * I + i);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      const V a = load(x + t * I + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) s[r][t] += v[r] * a;
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      float sum = total(s[r][t]);
      for (int64_t j = i; j < I; j++) sum += f32_of_bf16(w[r * I + j]) * x[t * I + j];
      c[r * T + t] = sum;
    }
}

template <int T>
static void rows_of(const uint16_t* w, int64_t I, int64_t row, int64_t end, const float* x, const Output& out) {
  constexpr int R = T <= 4 ? 4 : 2;
  float c[R * T], one;
  for (; row < end;) {
    const int n = end - row >= R ? R : 1;
    n == R ? dots<R, T>(w + row * I, I, x, c) : dots<1, T>(w + row * I, I, x, c);
    for (int r = 0; r < n; r++)
      for (int t = 0; t < T; t++) {
        one = c[r * T + t];
        put(out.out, out.type, t * out.stride + row + r, &one, 1);
      }
    row += n;
  }
}

static void bf16_few(const uint16_t* w, int64_t I, int64_t row, int64_t end, const float* x, int64_t T, const Output& out) {
  switch (T) {
    case 1: return rows_of<1>(w, I, row, end, x, out);
    case 2: return rows_of<2>(w, I, row, end, x, out);
    case 3: return rows_of<3>(w, I, row, end, x, out);
    case 4: return rows_of<4>(w, I, row, end, x, out);
    case 5: return rows_of<5>(w, I, row, end, x, out);
    case 6: return rows_of<6>(w, I, row, end, x, out);
    case 7: return rows_of<7>(w, I, row, end, x, out);
    default: return rows_of<8>(w, I, row, end, x, out);
  }
}

// scores[g][at .. at + count] = q[g] . keys * H^-0.5 for one run of keys that lie `stride` apart
template <class E>
static void scores_of(const float* q, int64_t G, int64_t H, const E* keys, int64_t stride, int64_t count, float* scores, int64_t S) {
  const float by = 1.0f / std::sqrt(float(H));
  for (int64_t s = 0; s < count; s++) {
    const E* key = keys + s * stride;
    int64_t g = 0;
    for (; g + 4 <= G; g += 4) {
      V sum[4] = {};
      for (int64_t h = 0; h < H; h += 16) {
        const V k = load(key + h);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[j] += k * load(q + (g + j) * H + h);
      }
      for (int j = 0; j < 4; j++) scores[(g + j) * S + s] = total(sum[j]) * by;
    }
    for (; g < G; g++) {
      V sum = {};
      for (int64_t h = 0; h < H; h += 16) sum += load(key + h) * load(q + g * H + h);
      scores[g * S + s] = total(sum) * by;
    }
  }
}

// out[g] += weights[g][s] * values[s]
template <class E, int Q>
static inline void gather_of(const float* weights, int64_t S, const E* values, int64_t stride, int64_t count, float* out, int64_t H) {
  for (int64_t h = 0; h < H; h += 32) {
    const bool two = h + 32 <= H;
    V sum[Q][2];
    for (int j = 0; j < Q; j++) {
      sum[j][0] = load(out + j * H + h);
      if (two) sum[j][1] = load(out + j * H + h + 16);
    }
    for (int64_t s = 0; s < count; s++) {
      const V v0 = load(values + s * stride + h);
      const V v1 = two ? load(values + s * stride + h + 16) : v0;
#pragma GCC unroll 4
      for (int j = 0; j < Q; j++) {
        sum[j][0] += v0 * weights[j * S + s];
        sum[j][1] += v1 * weights[j * S + s];
      }
    }
    for (int j = 0; j < Q; j++) {
      std::memcpy(out + j * H + h, &sum[j][0], 64);
      if (two) std::memcpy(out + j * H + h + 16, &sum[j][1], 64);
    }
  }
}

static void softmax(float* row, int64_t n) {
  float top = row[0];
  for (int64_t i = 1; i < n; i++) top = row[i] > top ? row[i] : top;
  float part[16] = {0}, sum = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 16; j++) part[j] += row[i + j] = exp_approx(row[i + j] - top);
  for (; i < n; i++) sum += row[i] = exp_approx(row[i] - top);
  for (int j = 0; j < 16; j++) sum += part[j];
  const float by = 1.0f / sum;
  for (i = 0; i < n; i++) row[i] *= by;
}

template <class E>
static void paged_as(const PagedJob& job, int64_t sequence, int64_t kv_head, float* scratch) {
  const int64_t G = job.N / job.K, H = job.H, S = job.lengths[sequence], stride = job.K * H;
  float *q = scratch, *out = q + G * H, *scores = out + G * H;
  load_row(Rows{job.q, job.type, job.N * H}, sequence, kv_head * G * H, int(G * H), q);
  std::memset(out, 0, sizeof(float) * size_t(G * H));
  const E* keys = static_cast<const E*>(job.keys) + kv_head * H;
  const E* values = static_cast<const E*>(job.values) + kv_head * H;
  const int64_t* pages = job.pages + sequence * job.max_pages;
  for (int64_t at = 0, p = 0; at < S; at += job.page_size, p++) {
    const int64_t count = S - at < job.page_size ? S - at : job.page_size;
    scores_of<E>(q, G, H, keys + pages[p] * job.page_size * stride, stride, count, scores + at, S);
  }
  for (int64_t g = 0; g < G; g++) softmax(scores + g * S, S);
  for (int64_t at = 0, p = 0; at < S; at += job.page_size, p++) {
    const int64_t count = S - at < job.page_size ? S - at : job.page_size;
    const E* from = values + pages[p] * job.page_size * stride;
    int64_t g = 0;
    for (; g + 4 <= G; g += 4) gather_of<E, 4>(scores + g * S + at, S, from, stride, count, out + g * H, H);
    for (; g < G; g++) gather_of<E, 1>(scores + g * S + at, S, from, stride, count, out + g * H, H);
  }
  put(job.out, job.type, (sequence * job.N + kv_head * G) * H, out, int(G * H));
}

static void paged(const PagedJob& job, int64_t sequence, int64_t kv_head, float* scratch) {
  job.cache_type == Type::f32 ? paged_as<float>(job, sequence, kv_head, scratch) : paged_as<uint16_t>(job, sequence, kv_head, scratch);
}

}  // namespace ERNIE_ISA

#define ERNIE_JOIN2(a, b) a##b
#define ERNIE_JOIN(a, b) ERNIE_JOIN2(a, b)
const FloatKernels& ERNIE_JOIN(ERNIE_ISA, _floats)() {
  static const FloatKernels kernels{ERNIE_ISA::widen, ERNIE_ISA::bf16_few, ERNIE_ISA::paged};
  return kernels;
}

}  // namespace ernie
