// Attention of a tower's patches over all patches of their frame, on AMX bfloat16 tiles; the layout is described in tower.h.
//
// Scores stand as [key][16 queries], so the softmax of 16 queries goes down their columns, and two rows of weights put together are the right
// operand of the product with the values: nothing is turned over. Keys are taken in blocks that stay in the second cache, with a running maximum.
#include <cmath>
#include <cstring>

#include "tower_tiles.h"

namespace ernie {
namespace tower_attention {

using namespace tower_tiles;

constexpr int64_t kKeys = 192;    // of one block
constexpr int64_t kQueries = 16;  // strips of queries that pass by it

struct Work {
  alignas(64) float scores[2][kKeys][16];
  alignas(64) uint16_t weights[2][kKeys / 32][512];
  alignas(64) float most[kQueries][16], sum[kQueries][16];
  alignas(64) float out[1];  // [kQueries][H][16]
};

size_t scratch_bytes(int64_t H) { return sizeof(Work) + size_t(kQueries * H * 16) * 4; }

// Scores of two strips of queries and `tiles` tiles of keys (an even number).
static void score(Work& work, const uint16_t* q, const uint16_t* k, int64_t steps, int64_t tiles) {
  for (int64_t tile = 0; tile < tiles; tile += 2) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s++) {
      const uint16_t* keys = k + (tile * steps + s) * 512;
      _tile_loadd(4, keys, 64);
      _tile_loadd(6, q + s * 512, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, q + (steps + s) * 512, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, keys + steps * 512, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, work.scores[0][tile * 16], 64);
    _tile_stored(1, work.scores[1][tile * 16], 64);
    _tile_stored(2, work.scores[0][tile * 16 + 16], 64);
    _tile_stored(3, work.scores[1][tile * 16 + 16], 64);
  }
}

// 128 (1 + f - 2^f) for f = 0, 1 / 64 ...: what a straight line between powers of two is too high, in the last places of a bfloat16 number.
struct Excess {
  alignas(64) uint8_t by[64];
  constexpr Excess() : by{} {
    for (int i = 0; i < 64; i++) {
      const double f = (i + 0.25) / 64;
      double power = 1, term = 1;
      for (int n = 1; n < 12; n++) power += term *= f * 0.6931471805599453 / n;
      by[i] = uint8_t(128 * (1 + f - power) + 0.5);
    }
  }
};
constexpr Excess kExcess;

constexpr float kPlaces = 128;         // of a bfloat16 number's fraction
constexpr float kWhole = 12582912;     // 1.5 * 2^23
constexpr float kLargestPower = 1 << 24;

// Scores of one strip to weights over `keys` (a multiple of 32) of them; what was gathered before is scaled to the new maximum.
//
// A weight 2^t becomes bfloat16 without having been anything else: 128 t, rounded, is exponent and fraction of a number a little too high, and
// the fraction says by how much (Schraudolph 1999, with a table behind it). It is off by 0.4 % at most where rounding alone is by 0.2 %, and
// the sum is taken of the same numbers. The maximum is a whole power of two, so that what is kept scales without loss.
static void weigh(Work& work, int half, int64_t strip, float* out, int64_t H, int64_t keys) {
  const float(*scores)[16] = work.scores[half];
  uint16_t* to = work.weights[half][0];
  const __m512 by = _mm512_set1_ps(1.44269504f / std::sqrt(float(H))), last_places = _mm512_mul_ps(by, _mm512_set1_ps(kPlaces));
  const __m512 before = _mm512_load_ps(work.most[strip]);
  __m512 m[4];
  for (auto& each : m) each = _mm512_set1_ps(-INFINITY);
  for (int64_t key = 0; key < keys; key += 4)
    for (int j = 0; j < 4; j++) m[j] = _mm512_max_ps(_mm512_load_ps(scores[key + j]), m[j]);
  const __m512 largest = _mm512_mul_ps(_mm512_max_ps(_mm512_max_ps(m[0], m[1]), _mm512_max_ps(m[2], m[3])), by);
  const __m512 most = _mm512_max_ps(_mm512_roundscale_ps(largest, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC), before);
  // 1.5 * 2^23 + n has the whole number n in its lowest bits; of scores so large that this is not exact come no numbers
  const __m512 zero = _mm512_set1_ps(kWhole);
  const __mmask16 exact = _mm512_cmp_ps_mask(_mm512_abs_ps(most), _mm512_set1_ps(kLargestPower), _CMP_LT_OQ);
  const __m512 one = _mm512_fnmadd_ps(most, _mm512_set1_ps(kPlaces), _mm512_set1_ps(kWhole + 127 * kPlaces));
  const __m512 shift = _mm512_mask_mov_ps(_mm512_set1_ps(NAN), exact, one);
  const auto fixed = [&](int64_t key) {
    return _mm512_castps_si512(_mm512_max_ps(zero, _mm512_fmadd_ps(_mm512_load_ps(scores[key]), last_places, shift)));
  };
  const __m512i table = _mm512_load_si512(kExcess.by), ones = _mm512_set1_epi16(0x3f80);
  const __m512 scale = _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_sub_ps(before, most));
  __m512 sums[2] = {_mm512_mul_ps(_mm512_load_ps(work.sum[strip]), scale), _mm512_setzero_ps()};
  for (int64_t key = 0; key < keys; key += 4)
    for (int j = 0; j < 2; j++) {
      const __m512i line = _mm512_mask_blend_epi16(0xaaaaaaaa, fixed(key + 2 * j), _mm512_slli_epi32(fixed(key + 2 * j + 1), 16));
      const __m512i words = _mm512_sub_epi16(line, _mm512_maskz_permutexvar_epi8(0x5555555555555555, _mm512_srli_epi16(line, 1), table));
      _mm512_store_si512(to + (key + 2 * j) * 16, words);
      sums[j] = _mm512_dpbf16_ps(sums[j], reinterpret_cast<const __m512bh&>(words), reinterpret_cast<const __m512bh&>(ones));
    }
  _mm512_store_ps(work.most[strip], most);
  _mm512_store_ps(work.sum[strip], _mm512_add_ps(sums[0], sums[1]));
  if (_mm512_cmp_ps_mask(before, most, _CMP_NEQ_UQ))
    for (int64_t h = 0; h < H; h++) _mm512_store_ps(out + h * 16, _mm512_mul_ps(_mm512_load_ps(out + h * 16), scale));
}

// out [n tiles of 16 values][16 queries] of two strips += values x weights over `steps` steps of 32 keys, `stride` numbers apart
template <int n>
static void gather(const uint16_t* weights, const uint16_t* values, int64_t stride, int64_t steps, float* out, float* other) {
  _tile_loadd(0, out, 64);
  _tile_loadd(1, other, 64);
  if constexpr (n > 1) _tile_loadd(2, out + 256, 64);
  if constexpr (n > 1) _tile_loadd(3, other + 256, 64);
  for (int64_t s = 0; s < steps; s++) {
    _tile_loadd(4, values + s * stride, 64);
    _tile_loadd(6, weights + s * 512, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + (kKeys / 32 + s) * 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (n > 1) {
      _tile_loadd(5, values + s * stride + 512, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, 64);
  _tile_stored(1, other, 64);
  if constexpr (n > 1) _tile_stored(2, out + 256, 64);
  if constexpr (n > 1) _tile_stored(3, other + 256, 64);
}

static void gather_all(const uint16_t* weights, const uint16_t* values, int64_t H, int64_t steps, float* out) {
  int64_t h = 0;
  for (; h + 32 <= H; h += 32) gather<2>(weights, values + h * 32, H * 32, steps, out + h * 16, out + (H + h) * 16);
  if (h < H) gather<1>(weights, values + h * 32, H * 32, steps, out + h * 16, out + (H + h) * 16);
}

static void some_queries(Work& work, const Heads& heads, uint16_t* part, int64_t head, int64_t q, int64_t strips, uint16_t* columns) {
  const int64_t H = heads.H, steps = heads.steps(), size = heads.size;
  for (int64_t s = 0; s < strips; s++) {
    _mm512_store_ps(work.most[s], _mm512_set1_ps(-INFINITY));
    _mm512_store_ps(work.sum[s], _mm512_setzero_ps());
  }
  std::memset(work.out, 0, size_t(strips * H * 16) * 4);
  for (int64_t at = 0; at < size; at += kKeys) {
    const int64_t count = size - at < kKeys ? size - at : kKeys, key_steps = (count + 31) / 32;
    const uint16_t *keys = heads.keys(part) + at / 16 * steps * 512, *values = heads.values(part) + at / 32 * H * 32;
    for (int64_t s = 0; s < strips; s += 2) {
      score(work, part + (q + s) * steps * 512, keys, steps, 2 * key_steps);
      for (int half = 0; half < 2; half++) {
        for (int64_t none = count; none < 32 * key_steps; none++) _mm512_store_ps(work.scores[half][none], _mm512_set1_ps(-INFINITY));
        weigh(work, half, s + half, work.out + (s + half) * H * 16, H, 32 * key_steps);
      }
      gather_all(work.weights[0][0], values, H, key_steps, work.out + s * H * 16);
    }
  }
  for (int64_t s = 0; s < strips; s++) {
    const __m512 by = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(work.sum[s]));
    const float* out = work.out + s * H * 16;
    for (int64_t h = 0; h < H; h += 2)
      _mm512_store_si512(columns + s * heads.N * H * 16 + pair_at(head * H + h),
                         words_of({_mm512_mul_ps(_mm512_load_ps(out + h * 16), by), _mm512_mul_ps(_mm512_load_ps(out + h * 16 + 16), by)}));
  }
}

void attend(const Heads& heads, uint16_t* part, int64_t head, int64_t q, int64_t q_end, uint16_t* out, void* scratch) {
  const TileShape shape;
  _tile_loadconfig(&shape);
  for (int64_t s = q; s < q_end; s += kQueries)
    some_queries(*static_cast<Work*>(scratch), heads, part, head, s, q_end - s < kQueries ? q_end - s : kQueries, out + (s - q) * heads.N * heads.H * 16);
  _tile_release();
}

}  // namespace tower_attention
}  // namespace ernie
