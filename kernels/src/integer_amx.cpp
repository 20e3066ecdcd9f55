// Integer products with AMX int8 tiles (16 x 64 bytes); few rows go the AVX-512 way, where the weights come from memory anyway.
//
// A tile holds one group's sums for 16 tokens x 16 outputs; they leave the tile once per group, to be scaled. That traffic, not the
// multiplication, is what groups of 64 cost here: groups of 128 and whole channels are faster.
#define ERNIE_ISA amx
#include <immintrin.h>

#include "panel.h"
#include "tiles.h"

namespace ernie {
namespace amx {

using tiles::TileShape;

constexpr int64_t kSmallGroup = 128;  // larger ones gain more from tiles that are used twice

struct Micro {
  static constexpr int rows_at_once = 32;
  static constexpr bool unpacks_bytes = true;  // to signed bytes: then no offset is to be taken back

  const Quantised& x;
  const int64_t block_bytes;
  const int bits;
  int64_t step;  // inputs of one tile
  alignas(64) int32_t sums[2][4][16 * 16];

  Micro(const Packed& w, const Quantised& activations) : x(activations), block_bytes(w.block_bytes()), bits(w.bits), step(w.group() % 64 == 0 ? 64 : 32) {
    TileShape shape;
    for (int i = 0; i < 4; i++) shape.bytes[i] = 64, shape.rows[i] = 16;                                // sums
    for (int i = 4; i < 6; i++) shape.bytes[i] = uint16_t(step), shape.rows[i] = 16;                    // activations
    for (int i = 6; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = uint8_t(step / 4);                 // weights
    _tile_loadconfig(&shape);
  }
  ~Micro() { _tile_release(); }
  Micro(const Micro&) = delete;

  template <int bits>
  static void unpack(const uint8_t* packed, int64_t I, uint8_t* out) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8), sign = _mm512_set1_epi8(-128);
    for (int64_t at = 0; at < I * 16 * bits / 8; at += 64) {
      const __m512i b = _mm512_loadu_si512(packed + at);
      _mm_prefetch(reinterpret_cast<const char*>(packed + at + 2048), _MM_HINT_T0);
      if (bits == 8) {
        _mm512_store_si512(out + at, _mm512_xor_si512(b, sign));
      } else {
        _mm512_store_si512(out + at * 2, _mm512_sub_epi8(_mm512_and_si512(b, low), eight));
        _mm512_store_si512(out + at * 2 + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(b, 4), low), eight));
      }
    }
  }

  // One group of `H` x 16 tokens and `B` x 16 outputs; value: the two blocks' bytes of this group
  template <int H, int B>
  void group_sums(const int8_t* a, const uint8_t* v0, const uint8_t* v1, int64_t group, int32_t (*to)[256]) const {
    _tile_zero(0);
    if (B == 2) _tile_zero(1);
    if (H == 2) _tile_zero(2);
    if (H == 2 && B == 2) _tile_zero(3);
    for (int64_t k = 0; k < group; k += step) {
      _tile_loadd(4, a + k, x.I);
      _tile_loadd(6, v0 + k * 16, 64);
      _tile_dpbssd(0, 4, 6);
      if (B == 2) {
        _tile_loadd(7, v1 + k * 16, 64);
        _tile_dpbssd(1, 4, 7);
      }
      if (H == 2) {
        _tile_loadd(5, a + 16 * x.I + k, x.I);
        _tile_dpbssd(2, 5, 6);
        if (B == 2) _tile_dpbssd(3, 5, 7);
      }
    }
    _tile_stored(0, to[0], 64);
    if (B == 2) _tile_stored(1, to[1], 64);
    if (H == 2) _tile_stored(2, to[2], 64);
    if (H == 2 && B == 2) _tile_stored(3, to[3], 64);
  }

  template <int B>
  void add_group(const int32_t (*sums_of)[256], const float* scale, int64_t g, int64_t t0, int m, float* c) const {
    __m512 d[B];
    for (int b = 0; b < B; b++) d[b] = _mm512_loadu_ps(scale + (b * x.G + g) * 16);
    for (int i = 0; i < m; i++) {
      const __m512 by = _mm512_set1_ps(x.scale[(t0 + i) * x.G + g]);
#pragma GCC unroll 2
      for (int b = 0; b < B; b++) {
        float* to = c + (i * kPanelBlocks + b) * 16;
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(sums_of[(i / 16) * 2 + b] + (i % 16) * 16));
        const __m512 before = g ? _mm512_load_ps(to) : _mm512_setzero_ps();
        _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_mul_ps(d[b], by), whole, before));
      }
    }
  }

  template <int H, int B>
  void tile(const uint8_t* const* value, const float* scale, int64_t t0, int m, float* c) {
    const int64_t group = x.I / x.G;
    const int8_t* a = x.value + t0 * x.I;
    for (int64_t g = 0; g < x.G; g++) {  // the next group's products run while this one's sums are scaled
      group_sums<H, B>(a + g * group, value[0] + g * group * 16, value[B - 1] + g * group * 16, group, sums[g & 1]);
      if (g) add_group<B>(sums[(g - 1) & 1], scale, g - 1, t0, m, c);
    }
    add_group<B>(sums[(x.G - 1) & 1], scale, x.G - 1, t0, m, c);
  }

  // One block of 16 tokens x 16 outputs whose sums stay in registers from group to group: what pays where groups are small. Groups go in
  // pairs; while one pair's products run, the sums of the pair before are scaled: a tile that was just stored cannot be read without waiting.
  // `ahead`: packed weights that will be wanted next, fetched meanwhile; null where they are used often enough not to matter.
  void small_groups(const int8_t* a, const uint8_t* v, const float* scale, const float* by, float* c, int64_t c_stride, const uint8_t* ahead) {
    const int64_t group = x.I / x.G, ahead_bytes = group * 16 * bits / 8;
    __m512 f[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) f[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < x.G + 2; g += 2) {
      int32_t (*to)[256] = sums[g / 2 % 2];
      if (g < x.G) {
        if (ahead)
          for (int64_t at = g * ahead_bytes; at < (g + 2) * ahead_bytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead + at), _MM_HINT_T1);
        _tile_zero(0);
        for (int64_t k = g * group; k < (g + 1) * group; k += step) {
          _tile_loadd(4, a + k, x.I);
          _tile_loadd(6, v + k * 16, 64);
          _tile_dpbssd(0, 4, 6);
        }
        if (g + 1 < x.G) {
          _tile_zero(1);
          for (int64_t k = (g + 1) * group; k < (g + 2) * group; k += step) {
            _tile_loadd(5, a + k, x.I);
            _tile_loadd(7, v + k * 16, 64);
            _tile_dpbssd(1, 5, 7);
          }
        }
        _tile_stored(0, to[0], 64);
        if (g + 1 < x.G) _tile_stored(1, to[1], 64);
      }
      for (int64_t j = g - 2; g && j < g && j < x.G; j++) {
        const int32_t* from = sums[(g / 2 + 1) % 2][j % 2];
        const __m512 d = _mm512_loadu_ps(scale + j * 16);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
          const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(from + i * 16));
          f[i] = _mm512_fmadd_ps(_mm512_mul_ps(d, _mm512_set1_ps(by[j * 16 + i])), whole, f[i]);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_ps(c + i * c_stride, f[i]);
  }

  // The activations' scales of 16 tokens by group, zeros behind the last token.
  void scales_by_group(int64_t t0, int m, float* by) const {
    for (int64_t g = 0; g < x.G; g++)
      for (int i = 0; i < 16; i++) by[g * 16 + i] = i < m ? x.scale[(t0 + i) * x.G + g] : 0.0f;
  }

  // Tiles read whole: behind the last token there are rows that nobody looks at, see `kTokenPadding`.
  void tiles(const uint8_t* const* value, const float* scale, int blocks, int64_t t0, int m, float* c, const uint8_t* next) {
    if (x.I / x.G <= kSmallGroup) {
      static thread_local float by[kWidest / 32 * 16];
      for (int h = 0; h < m; h += 16) {
        scales_by_group(t0 + h, m - h, by);
        for (int b = 0; b < blocks; b++)
          small_groups(x.value + (t0 + h) * x.I, value[b], scale + b * x.G * 16, by, c + (h * kPanelBlocks + b) * 16, kPanelBlocks * 16,
                       x.T <= 32 && next ? next + b * block_bytes : nullptr);
      }
      return;
    }
    for (int b = 0; b < blocks; b += 2) {
      const float* s = scale + b * x.G * 16;
      if (blocks - b > 1) {
        m > 16 ? tile<2, 2>(value + b, s, t0, m, c + b * 16) : tile<1, 2>(value + b, s, t0, m, c + b * 16);
      } else {
        m > 16 ? tile<2, 1>(value + b, s, t0, m, c + b * 16) : tile<1, 1>(value + b, s, t0, m, c + b * 16);
      }
    }
  }
};

}  // namespace amx

const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512_kernels();
    k.name = "amx";
    k.many = amx::many<amx::Micro>;
    k.many_pairs = amx::many_pairs<amx::Micro>;
    k.floats = &amx_floats();
    k.tiled = &amx_attention();
    k.tower = &amx_tower();
    k.products = &amx_products();
    return k;
  }();
  return kernels;
}

}  // namespace ernie
