// Attention over pages. Written with the compiler's vector types and compiled once per instruction set (ERNIE_ISA), products contracted to
// fused ones; sums are float32.
#include "lanes.h"

namespace ernie {
namespace ERNIE_ISA {

void packed(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, void* scratch);  // floats_packed.cpp
size_t whole_scratch(const Packed& w);                                                                           // floats_whole.cpp
void whole(const Packed& w, const Quantised& x, const void*, int64_t block, int64_t end, const Output& out, void* scratch);
static size_t nothing(const Quantised&) { return 0; }

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
  static const FloatKernels kernels{false, ERNIE_ISA::nothing, nullptr, ERNIE_ISA::whole_scratch, ERNIE_ISA::whole, ERNIE_ISA::packed, ERNIE_ISA::paged};
  return kernels;
}

}  // namespace ernie
