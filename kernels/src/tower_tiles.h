// What the tower's AMX kernels share: vectors of 16 patches, pairs of bfloat16, tiles.
#pragma once
#include <immintrin.h>

#include "tiles.h"
#include "tower.h"

namespace ernie {
namespace tower_tiles {

using tiles::TileShape;
using tiles::transpose;

// Two rows of bfloat16, an even one and the odd one behind it, 16 patches each.
struct Pair {
  __m512 even, odd;
};

static inline Pair pair_of(__m512i words) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))))};
}
static inline Pair load_pair(const uint16_t* p) { return pair_of(_mm512_load_si512(p)); }

static inline __m512i words_of(Pair p) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh both = _mm512_cvtne2ps_pbh(p.odd, p.even);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<const __m512i&>(both));
}

// Rows o and o + 1 of columns that begin at `columns`; o is even.
static inline int64_t pair_at(int64_t o) { return o / 32 * 512 + o % 32 * 16; }

// 2^t by a polynomial of degree 3: off by 8e-5 at most, a twentieth of what rounding to bfloat16 takes. No number stays none.
static inline __m512 exp2_quick(__m512 t) {
  t = _mm512_max_ps(_mm512_set1_ps(-150.0f), t);
  const __m512 f = _mm512_reduce_ps(t, 1);  // t - floor(t)
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802446f), f, _mm512_set1_ps(0.22606727f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583348f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992522f));
  return _mm512_scalef_ps(p, t);  // times 2^floor(t)
}

}  // namespace tower_tiles
}  // namespace ernie
