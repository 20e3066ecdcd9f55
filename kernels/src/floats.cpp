// Products with bfloat16 weights, and attention over pages. Written with the compiler's vector types and compiled once per instruction set
// (ERNIE_ISA), products contracted to fused ones; sums are float32.
#include "rows.h"

namespace ernie {
namespace ERNIE_ISA {

void packed(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, void* scratch);  // floats_packed.cpp

// The totals of four vectors: halves are folded pairwise, so that eight shuffles serve all four.
static inline void totals(const V* v, float* out) {
  const V ab = __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[0], v[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const V cd = __builtin_shufflevector(v[2], v[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(v[2], v[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  V s = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
        __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  s += __builtin_shufflevector(s, s, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  s += __builtin_shufflevector(s, s, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  for (int j = 0; j < 4; j++) out[j] = s[4 * j];
}

// Activations are packed to float32 rows in one piece.
static size_t packed_size(Type, int64_t T, int64_t I) { return size_t(T * I) * sizeof(float); }

static void pack(const Rows& x, int64_t, int64_t I, int64_t row, int64_t end, void* packed) {
  for (float* out = static_cast<float*>(packed) + row * I; row < end; row++, out += I)
    for (int64_t i = 0; i < I; i += 16) {
      const int n = int(I - i < 16 ? I - i : 16);
      put(out, Type::f32, i, get(x.data, x.type, row * x.stride + i, n), n);
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
  float c[R * T];
  for (; row < end;) {
    const int n = end - row >= R ? R : 1;
    n == R ? dots<R, T>(w + row * I, I, x, c) : dots<1, T>(w + row * I, I, x, c);
    for (int r = 0; r < n; r++)
      for (int t = 0; t < T; t++) {
        const int64_t at = t * out.stride + row + r;
        if (out.type == Type::f32) static_cast<float*>(out.out)[at] = c[r * T + t];
        else put(out.out, out.type, at, V{} + c[r * T + t], 1);
      }
    row += n;
  }
}

static size_t product_scratch(int64_t) { return 0; }

static void product(const uint16_t* w, int64_t I, int64_t row, int64_t end, const void* packed, Type, int64_t T, const Output& out, void*) {
  const float* x = static_cast<const float*>(packed);
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

// The vector that one instruction of this set adds. Attention keeps arrays of sums, and GCC 12 keeps those in registers only at this width.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using W = float __attribute__((vector_size(kLanes * 4), may_alias, aligned(4)));
using F4 = float __attribute__((vector_size(16)));

static inline W part(const float* p) { return *reinterpret_cast<const W*>(p); }
static inline W part(const uint16_t* p) {
  using Halves = uint16_t __attribute__((vector_size(kLanes * 2), may_alias, aligned(2)));
  using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
  return reinterpret_cast<W>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}

static inline void totals_of(const W* v, float* out) {
#if defined(__AVX512F__)
  totals(v, out);
#else
  for (int j = 0; j < 4; j++) {
    F4 s;
    std::memcpy(&s, &v[j], 16);
#if defined(__AVX__)
    s += __builtin_shufflevector(v[j], v[j], 4, 5, 6, 7);
#endif
    s += __builtin_shufflevector(s, s, 2, 3, 0, 1);
    out[j] = s[0] + s[1];
  }
#endif
}

// scores[g][at .. at + count] = q[g] . keys * H^-0.5 for one run of keys that lie `stride` apart
template <class E>
static void scores_of(const float* q, int64_t G, int64_t H, const E* keys, int64_t stride, int64_t count, float* scores, int64_t S) {
  const float by = 1.0f / std::sqrt(float(H));
  for (int64_t s = 0; s < count; s++) {
    const E* key = keys + s * stride;
    int64_t g = 0;
    for (; g + 4 <= G; g += 4) {
      const float* first = q + g * H;
      W s0 = {}, s1 = {}, s2 = {}, s3 = {};
      for (int64_t h = 0; h < H; h += kLanes) {
        const W k = part(key + h);
        s0 += k * part(first + h);
        s1 += k * part(first + H + h);
        s2 += k * part(first + 2 * H + h);
        s3 += k * part(first + 3 * H + h);
      }
      const W sum[4] = {s0, s1, s2, s3};
      float four[4];
      totals_of(sum, four);
      for (int j = 0; j < 4; j++) scores[(g + j) * S + s] = four[j] * by;
    }
    for (; g < G; g++) {
      V sum = {};
      for (int64_t h = 0; h < H; h += 16) sum += load(key + h) * load(q + g * H + h);
      scores[g * S + s] = total(sum) * by;
    }
  }
}

// out[g] += weights[g][s] * values[s]; H is a multiple of 16
template <class E, int Q>
static inline void gather_of(const float* weights, int64_t S, const E* values, int64_t stride, int64_t count, float* out, int64_t H) {
  for (int64_t h = 0; h < H; h += 2 * kLanes) {
    const bool two = h + 2 * kLanes <= H;
    W sum[Q][2];
#pragma GCC unroll 4
    for (int j = 0; j < Q; j++) sum[j][0] = part(out + j * H + h), sum[j][1] = two ? part(out + j * H + h + kLanes) : W{};
    for (int64_t s = 0; s < count; s++) {
      const W v0 = part(values + s * stride + h);
      const W v1 = two ? part(values + s * stride + h + kLanes) : v0;
#pragma GCC unroll 4
      for (int j = 0; j < Q; j++) {
        sum[j][0] += v0 * weights[j * S + s];
        sum[j][1] += v1 * weights[j * S + s];
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < Q; j++) {
      std::memcpy(out + j * H + h, &sum[j][0], kLanes * 4);
      if (two) std::memcpy(out + j * H + h + kLanes, &sum[j][1], kLanes * 4);
    }
  }
}

// Weights that sum to one. The row is read in whole vectors: behind its n scores there is room for 15 more.
static void softmax(float* row, int64_t n) {
  for (int64_t i = n; i % 16; i++) row[i] = -INFINITY;
  V most = load(row), sum = {};
  for (int64_t i = 16; i < n; i += 16) most = load(row + i) > most ? load(row + i) : most;
  float top = most[0];
  for (int j = 1; j < 16; j++) top = most[j] > top ? most[j] : top;
  for (int64_t i = 0; i < n; i += 16) {
    const V e = load(row + i) == -INFINITY ? V{} : exp_approx(load(row + i) - top);
    std::memcpy(row + i, &e, 64);
    sum += e;
  }
  const float by = 1.0f / total(sum);
  for (int64_t i = 0; i < n; i++) row[i] *= by;
}

template <class E>
static void paged_as(const PagedJob& job, int64_t sequence, int64_t kv_head, float* scratch) {
  const int64_t G = job.N / job.K, H = job.H, length = job.lengths[sequence], stride = job.K * H;
  const int64_t S = (length + 15) / 16 * 16;  // scores of one query lie so far apart
  float *q = scratch, *out = q + G * H, *scores = out + G * H;
  for (int64_t i = 0; i < G * H; i += 16) {
    const V v = get(job.q, job.type, (sequence * job.N + kv_head * G) * H + i, 16);
    std::memcpy(q + i, &v, 64);
  }
  std::memset(out, 0, sizeof(float) * size_t(G * H));
  const E* keys = static_cast<const E*>(job.keys) + kv_head * H;
  const E* values = static_cast<const E*>(job.values) + kv_head * H;
  const int64_t* pages = job.pages + (job.table ? job.table[sequence] : sequence) * job.max_pages;
  for (int64_t at = 0, p = 0; at < length; at += job.page_size, p++) {
    const int64_t count = length - at < job.page_size ? length - at : job.page_size;
    scores_of<E>(q, G, H, keys + pages[p] * job.page_size * stride, stride, count, scores + at, S);
  }
  for (int64_t g = 0; g < G; g++) softmax(scores + g * S, length);
  for (int64_t at = 0, p = 0; at < length; at += job.page_size, p++) {
    const int64_t count = length - at < job.page_size ? length - at : job.page_size;
    const E* from = values + pages[p] * job.page_size * stride;
    int64_t g = 0;
    for (; g + 4 <= G; g += 4) gather_of<E, 4>(scores + g * S + at, S, from, stride, count, out + g * H, H);
    for (; g < G; g++) gather_of<E, 1>(scores + g * S + at, S, from, stride, count, out + g * H, H);
  }
  for (int64_t i = 0; i < G * H; i += 16) put(job.out, job.type, (sequence * job.N + kv_head * G) * H + i, load(out + i), 16);
}

static void paged(const PagedJob& job, int64_t sequence, int64_t kv_head, float* scratch) {
  job.cache_type == Type::f32 ? paged_as<float>(job, sequence, kv_head, scratch) : paged_as<uint16_t>(job, sequence, kv_head, scratch);
}

}  // namespace ERNIE_ISA

#define ERNIE_JOIN2(a, b) a##b
#define ERNIE_JOIN(a, b) ERNIE_JOIN2(a, b)
const FloatKernels& ERNIE_JOIN(ERNIE_ISA, _floats)() {
  static const FloatKernels kernels{kFewRows,       4, 1, ERNIE_ISA::packed_size, ERNIE_ISA::pack, ERNIE_ISA::product_scratch,
                                    ERNIE_ISA::product, ERNIE_ISA::packed, ERNIE_ISA::paged};
  return kernels;
}

}  // namespace ernie
