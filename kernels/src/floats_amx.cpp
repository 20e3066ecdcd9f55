// Products with bfloat16 weights on AMX tiles, exact to float32: tiles multiply bfloat16 numbers and add in float32, and a float32 activation
// is the sum of three bfloat16 ones (8 + 8 + 8 bits), so each weight is met three times and nothing of it is rounded away.
//
// The weight is the left operand as it is stored, [O, I] by rows: few rows of x stream it from memory once, unpacked. The activations are the
// small side and are packed per call: [blocks of 16 tokens][I / 32][terms] tiles of 16 pairs of inputs x 16 tokens.
#define ERNIE_ISA amx_tiles
#include <immintrin.h>

#include "rows.h"

namespace ernie {
namespace amx_tiles {

constexpr int64_t kRows = 32;        // of the weight, in one panel: two tiles
constexpr int64_t kDepth = 32;       // inputs of one tile
constexpr int64_t kTile = 512;       // bfloat16 numbers of one tile
constexpr int64_t kAhead = 12;       // tiles that are fetched before they are needed

static int64_t steps(int64_t I) { return (I + kDepth - 1) / kDepth; }
static int64_t token_blocks(int64_t T) { return (T + 15) / 16; }
static int terms(Type type) { return type == Type::f32 ? 3 : 1; }

static size_t packed_size(Type type, int64_t T, int64_t I) {
  return size_t(token_blocks(T) * steps(I) * terms(type) * kTile) * sizeof(uint16_t);
}

// 16 x 16 words: row and column change places
static inline void transpose(__m512i* r) {
  __m512i s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(s[i + j], s[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(s[i + j], s[i + j + 2]);
    }
  // r[4b + j]: words j, j + 4, ... of the rows 4b .. 4b + 3
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    s[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    s[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    s[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    s[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = s[i];
}

static inline __m512i words(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
static inline __m256i top_halves(V v) { return (__m256i)__builtin_convertvector(reinterpret_cast<U>(v) >> 16, H16); }

// 32 inputs of one row as bfloat16: the numbers themselves, or the three parts that add up to them. Parts are cut off, not rounded: what is left
// is then exact, and never overflows.
template <int P>
static inline void parts(const Rows& x, int64_t t, int64_t i, int64_t I, __m512i* out) {
  const int n = int(I - i < 32 ? I - i : 32);
  if (P == 1) {
    const uint16_t* row = static_cast<const uint16_t*>(x.data) + t * x.stride + i;
    out[0] = _mm512_maskz_loadu_epi16(n == 32 ? 0xffffffffu : (1u << n) - 1, row);
    return;
  }
  V half[2];
  for (int j = 0; j < 2; j++) half[j] = n > 16 * j ? get(x.data, x.type, t * x.stride + i + 16 * j, n - 16 * j) : V{};
  for (int p = 0; p < P; p++) {
    out[p] = words(top_halves(half[0]), top_halves(half[1]));
    for (int j = 0; j < 2; j++) {
      const V part = reinterpret_cast<V>(reinterpret_cast<U>(half[j]) & 0xffff0000u);
      const V left = half[j] - part;
      half[j] = left == left ? left : V{};  // behind an infinity nothing is left
    }
  }
}

template <int P>
static void pack_as(const Rows& x, int64_t T, int64_t I, int64_t block, int64_t end, uint16_t* out) {
  const int64_t K = steps(I);
  for (; block < end; block++)
    for (int64_t k = 0; k < K; k++) {
      __m512i rows[3][16];
      for (int i = 0; i < 16; i++) {
        __m512i part[3] = {};
        if (block * 16 + i < T) parts<P>(x, block * 16 + i, k * kDepth, I, part);
        for (int p = 0; p < P; p++) rows[p][i] = part[p];
      }
      for (int p = 0; p < P; p++) {
        transpose(rows[p]);
        uint16_t* tile = out + ((block * K + k) * P + p) * kTile;
        for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 32 * i, rows[p][i]);
      }
    }
}

static void pack(const Rows& x, int64_t T, int64_t I, int64_t block, int64_t end, void* out) {
  auto* to = static_cast<uint16_t*>(out);
  x.type == Type::f32 ? pack_as<3>(x, T, I, block, end, to) : pack_as<1>(x, T, I, block, end, to);
}

// Up to 32 rows of the weight: tiles of 16 rows x 32 inputs, `next` numbers apart along the inputs, rows `stride` apart.
struct Panel {
  const uint16_t* block[2];
  int64_t next, stride;
  const uint16_t* after;  // of the panel that comes next, to be fetched; null: none
};

// The panel in tiles that lie in one piece, zeros where the weight ends.
static Panel copied(const uint16_t* w, int64_t I, int64_t row, int64_t end, uint16_t* to) {
  const int64_t K = steps(I);
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t k = 0; k < K; k++) {
      const int64_t n = I - k * kDepth < kDepth ? I - k * kDepth : kDepth;
      const __mmask32 there = row + r >= end ? 0 : n == 32 ? 0xffffffffu : (1u << n) - 1;
      const __m512i v = _mm512_maskz_loadu_epi16(there, w + (row + r) * I + k * kDepth);
      _mm512_store_si512(to + ((r / 16) * K + k) * kTile + (r % 16) * kDepth, v);
    }
  return {{to, to + K * kTile}, kTile, kDepth, nullptr};
}

static inline void fetch(const uint16_t* rows, int64_t stride) {
  for (int i = 0; i < 16; i++) _mm_prefetch(reinterpret_cast<const char*>(rows + i * stride), _MM_HINT_T0);
}

// sums[b][n] = 16 rows of the weight x 16 tokens, for both blocks of the panel and N blocks of tokens
template <int P, int N>
static inline void products(const Panel& w, int64_t K, const uint16_t* x, float (*sums)[2][256]) {
  _tile_zero(0);
  _tile_zero(1);
  if (N == 2) _tile_zero(2);
  if (N == 2) _tile_zero(3);
  const int64_t stride = w.stride * 2, other = K * P * kTile;
  for (int64_t k = 0; k < K; k++) {
    if (w.after) {  // streamed: the rows lie far apart, and the machine foresees only some of them
      const int64_t ahead = k + kAhead;
      const bool here = ahead < K;
      fetch((here ? w.block[0] : w.after) + (here ? ahead : ahead - K) * kDepth, w.stride);
      fetch((here ? w.block[1] : w.after + 16 * w.stride) + (here ? ahead : ahead - K) * kDepth, w.stride);
    }
    _tile_loadd(4, w.block[0] + k * w.next, stride);
    _tile_loadd(5, w.block[1] + k * w.next, stride);
    for (int p = 0; p < P; p++) {
      const uint16_t* tile = x + (k * P + p) * kTile;
      _tile_loadd(6, tile, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (N == 2) {
        _tile_loadd(7, tile + other, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[1][0], 64);
  if (N == 2) _tile_stored(2, sums[0][1], 64);
  if (N == 2) _tile_stored(3, sums[1][1], 64);
}

// 16 rows of the weight x 16 tokens -> [tokens, 16]
static inline void store(const float* sums, int64_t t, int64_t T, int64_t column, const Output& out) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + 16 * i);
  transpose(r);
  const int n = int(out.width - column < 16 ? out.width - column : 16);
  if (n <= 0) return;
  for (int i = 0; i < 16 && t + i < T; i++) put(out.out, out.type, (t + i) * out.stride + column, reinterpret_cast<V>(r[i]), n);
}

template <int P>
static void product_as(const uint16_t* w, int64_t I, int64_t row, int64_t end, const uint16_t* x, int64_t T, const Output& out, uint16_t* scratch) {
  alignas(64) float sums[2][2][256];
  const int64_t K = steps(I), panel_size = 2 * K * kTile;
  const int64_t group = T <= kStreamedRows ? 1 : 4;  // panels that stay in the cache while x passes by
  const bool whole = I % kDepth == 0;
  for (; row < end; row += group * kRows) {
    Panel panels[4];
    int64_t count = 0;
    for (int64_t at = row; count < group && at < end; at += kRows, count++) {
      const bool streamed = T <= kStreamedRows && whole && at + kRows <= end;
      panels[count] = streamed ? Panel{{w + at * I, w + (at + 16) * I}, kDepth, I, w + (at + kRows) * I}
                               : copied(w, I, at, end, scratch + count * panel_size);
    }
    for (int64_t t = 0; t < T; t += 32)
      for (int64_t p = 0; p < count; p++) {
        const uint16_t* tokens = x + t / 16 * K * P * kTile;
        const bool two = T - t > 16;
        two ? products<P, 2>(panels[p], K, tokens, sums) : products<P, 1>(panels[p], K, tokens, sums);
        for (int b = 0; b < 2; b++)
          for (int n = 0; n <= two; n++) store(sums[b][n], t + 16 * n, T, row + p * kRows + 16 * b, out);
      }
  }
}

static size_t product_scratch(int64_t I) { return size_t(4 * 2 * steps(I) * kTile) * sizeof(uint16_t); }

struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {0};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static void product(const uint16_t* w, int64_t I, int64_t row, int64_t end, const void* x, Type type, int64_t T, const Output& out, void* scratch) {
  static const TileShape shape;
  _tile_loadconfig(&shape);
  const auto* tokens = static_cast<const uint16_t*>(x);
  auto* panels = static_cast<uint16_t*>(scratch);
  type == Type::f32 ? product_as<3>(w, I, row, end, tokens, T, out, panels) : product_as<1>(w, I, row, end, tokens, T, out, panels);
  _tile_release();
}

}  // namespace amx_tiles

const FloatKernels& amx_floats() {
  static const FloatKernels kernels = [] {
    FloatKernels k = avx512_floats();
    k.most_rows = 1024;
    k.row_block = amx_tiles::kRows;
    k.token_block = 16;
    k.packed_size = amx_tiles::packed_size;
    k.pack = amx_tiles::pack;
    k.product_scratch = amx_tiles::product_scratch;
    k.product = amx_tiles::product;
    return k;
  }();
  return kernels;
}

}  // namespace ernie
