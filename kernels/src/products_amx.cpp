// Products of two bfloat16 matrices on AMX tiles. Tiles are 16 items x 32 numbers of the left factor and 32 numbers x 16 items of the right one,
// numbers in pairs; a panel's tiles stay in the second cache while the other factor passes, two tiles at a time and of these at most kNearSteps
// steps, which stay in the first.
#include <immintrin.h>

#include <algorithm>

#include "products.h"
#include "tiles.h"

namespace ernie {
namespace product_tiles {

using tiles::TileShape;
using tiles::transpose;

constexpr int64_t kDepth = 32;        // numbers of one tile's items
constexpr int64_t kTile = 512;        // numbers of one tile
constexpr int64_t kSums = 1024;       // of two tiles by two
constexpr int64_t kNearSteps = 16;    // of two tiles, together 32 KiB
constexpr int64_t kPanelSteps = 32;   // of 16 tiles, together 512 KiB

static int64_t steps(const Product& p) { return (p.K + kDepth - 1) / kDepth; }
static int64_t pairs(int64_t items) { return (items + 31) / 32; }

// 16 items from `item`, numbers k .. k + 32, zeros beyond the matrix: [item][pair], or [pair][item] where items lie side by side.
static inline void load(const Factor& f, int64_t item, int64_t k, int64_t K, __m512i* r) {
  const int64_t items = std::clamp<int64_t>(f.count - item, 0, 16), numbers = std::min(K - k, kDepth);
  if (f.along) {
    const __mmask32 there = numbers == 32 ? 0xffffffffu : (1u << numbers) - 1;
    for (int64_t i = 0; i < 16; i++) r[i] = i < items ? _mm512_maskz_loadu_epi16(there, f.data + (item + i) * f.stride + k) : _mm512_setzero_si512();
    return;
  }
  const __mmask16 there = __mmask16((1u << items) - 1);
  for (int64_t j = 0; j < 16; j++) {
    const uint16_t* at = f.data + (k + 2 * j) * f.stride + item;
    const __m256i even = 2 * j < numbers ? _mm256_maskz_loadu_epi16(there, at) : _mm256_setzero_si256();
    const __m256i odd = 2 * j + 1 < numbers ? _mm256_maskz_loadu_epi16(there, at + f.stride) : _mm256_setzero_si256();
    r[j] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
}

// 32 items as two rows of `count` tiles from step `first`, the second one `next` numbers behind the first.
static void pack_pair(const Factor& f, bool left, int64_t item, int64_t first, int64_t count, int64_t K, int64_t next, uint16_t* out) {
  for (int half = 0; half < 2; half++)
    for (int64_t s = 0; s < count; s++) {
      __m512i r[16];
      load(f, item + 16 * half, (first + s) * kDepth, K, r);
      if (f.along != left) transpose(r);
      for (int i = 0; i < 16; i++) _mm512_store_si512(out + half * next + s * kTile + i * 32, r[i]);
    }
}

static size_t packed_size(const Product& p) { return size_t(pairs(p.passing().count) * 2 * steps(p) * kTile) * sizeof(uint16_t); }

static void pack(const Product& p, int64_t pair, int64_t end, char* packed) {
  const int64_t all = steps(p);
  for (; pair < end; pair++)
    pack_pair(p.passing(), !p.left_in_panels(), 32 * pair, 0, all, p.K, all * kTile, reinterpret_cast<uint16_t*>(packed) + pair * 2 * all * kTile);
}

// A factor's two rows of tiles, `next` numbers apart.
struct Tiles {
  const uint16_t* data;
  int64_t next;
};

// Adds the products of `count` steps to the tiles' sums.
static inline void multiply(const Tiles& left, const Tiles& right, int64_t count) {
  for (int64_t at = 0; at < count * kTile; at += kTile) {
    _tile_loadd(4, left.data + at, 64);
    _tile_loadd(6, right.data + at, 64);
    _tile_loadd(7, right.data + right.next + at, 64);
    _tile_loadd(5, left.data + left.next + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

static inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Sums lie as 32 rows of 32 numbers.
static inline void load_sums(const float* c) {
  _tile_loadd(0, c, 128);
  _tile_loadd(1, c + 16, 128);
  _tile_loadd(2, c + 512, 128);
  _tile_loadd(3, c + 528, 128);
}

static inline void store_sums(float* c) {
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + 512, 128);
  _tile_stored(3, c + 528, 128);
}

static void finish(const Product& p, const float* c, int64_t row, int64_t column) {
  const int64_t rows = std::min<int64_t>(p.left.count - row, 32), columns = std::min<int64_t>(p.right.count - column, 32);
  const __mmask32 there = columns == 32 ? 0xffffffffu : (1u << columns) - 1;
  for (int64_t i = 0; i < rows; i++) {
    const __m512 low = _mm512_load_ps(c + 32 * i), high = _mm512_load_ps(c + 32 * i + 16);
    const int64_t at = (row + i) * p.stride + column;
    if (p.type == Type::bf16) {
      const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
      _mm512_mask_storeu_epi16(static_cast<uint16_t*>(p.out) + at, there, reinterpret_cast<const __m512i&>(both));
      continue;
    }
    float* out = static_cast<float*>(p.out) + at;
    const __mmask16 first = __mmask16(there), second = __mmask16(there >> 16);
    _mm512_mask_storeu_ps(out, first, p.add ? _mm512_add_ps(low, _mm512_maskz_loadu_ps(first, out)) : low);
    _mm512_mask_storeu_ps(out + 16, second, p.add ? _mm512_add_ps(high, _mm512_maskz_loadu_ps(second, out + 16)) : high);
  }
}

// The panel, and the sums of its pairs: of one pair that passes, or of all where the panel has not room for all steps.
static size_t scratch(const Product& p, int64_t items) {
  const int64_t passing = steps(p) > kPanelSteps ? pairs(p.passing().count) : 1;
  return size_t(pairs(items)) * (2 * size_t(kPanelSteps * kTile) * sizeof(uint16_t) + size_t(passing * kSums) * sizeof(float));
}

static void panel(const Product& p, const char* packed, int64_t first, int64_t end, char* memory) {
  const int64_t all = steps(p), count = pairs(end - first), passing = pairs(p.passing().count);
  auto* tiles = reinterpret_cast<uint16_t*>(memory);
  float* sums = reinterpret_cast<float*>(tiles + count * 2 * kPanelSteps * kTile);
  TileShape shape;
  _tile_loadconfig(&shape);
  for (int64_t from = 0; from < all; from += kPanelSteps) {
    const int64_t width = std::min(all - from, kPanelSteps);
    for (int64_t q = 0; q < count; q++)
      pack_pair(p.panels(), p.left_in_panels(), first + 32 * q, from, width, p.K, width * kTile, tiles + q * 2 * width * kTile);
    for (int64_t s = 0; s < passing; s++)
      for (int64_t near = 0; near < width; near += kNearSteps) {
        const int64_t some = std::min(width - near, kNearSteps), k = from + near;
        const Tiles passes{reinterpret_cast<const uint16_t*>(packed) + (s * 2 * all + k) * kTile, all * kTile};
        for (int64_t q = 0; q < count; q++) {
          const Tiles stays{tiles + (q * 2 * width + near) * kTile, width * kTile};
          float* c = sums + (all > kPanelSteps ? s * count + q : q) * kSums;
          k ? load_sums(c) : zero_sums();
          p.left_in_panels() ? multiply(stays, passes, some) : multiply(passes, stays, some);
          store_sums(c);
          if (k + some < all) continue;
          p.left_in_panels() ? finish(p, c, first + 32 * q, 32 * s) : finish(p, c, 32 * s, first + 32 * q);
        }
      }
  }
  _tile_release();
}

}  // namespace product_tiles

const ProductKernels& amx_products() {
  static const ProductKernels kernels{product_tiles::packed_size, product_tiles::pack, product_tiles::scratch, product_tiles::panel};
  return kernels;
}

}  // namespace ernie
