// What every AMX kernel needs: the shape of its tiles, and 16 x 16 words turned over on their way into one.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace ernie {
namespace tiles {

// What `ldtilecfg` reads. As it stands: eight whole tiles of 16 rows x 64 bytes.
struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {0};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 16 x 16 words: row and column change places
static inline void transpose(__m512i* r) {
  __m512i s[16];
  for (int i = 0; i < 16; i += 2) s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
    }
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    s[j] = _mm512_shuffle_i32x4(a, c, 0x88), s[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    s[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88), s[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = s[i];
}

}  // namespace tiles
}  // namespace ernie
