// Products with bfloat16 weights on AMX tiles, exact to float32: tiles multiply bfloat16 numbers and add in float32, and a float32 activation
// is the sum of three bfloat16 ones (8 + 8 + 8 bits), so each weight is met three times and nothing of it is rounded away.
//
// The weight is the left operand as it is stored, [O, I] by rows: few rows of x stream it from memory once, unpacked. The activations are the
// small side and are packed per call into tiles of 16 pairs of inputs x `columns`, [blocks of columns][I / 32][terms]. Of few tokens each part is
// a column of its own, so that no column stands empty and all of x stays in the nearest cache; of many the parts follow each other (terms) and
// are added in the tile.
#define ERNIE_ISA amx_tiles
#include <immintrin.h>

#include "rows.h"
#include "tiles.h"

namespace ernie {
namespace amx_tiles {

using tiles::TileShape;
using tiles::transpose;

constexpr int64_t kRows = 32;        // of the weight, in one panel: two tiles
constexpr int64_t kDepth = 32;       // inputs of one tile
constexpr int64_t kTile = 512;       // bfloat16 numbers of one tile
constexpr int64_t kPanels = 4;       // stay in the cache while many tokens pass by
constexpr int64_t kAhead = 12;       // tiles that are fetched before they are needed

static int64_t steps(int64_t I) { return (I + kDepth - 1) / kDepth; }

struct Shape {
  int parts, terms;         // of a number; of those that the tile adds
  int64_t blocks, columns;  // tiles side by side, and how many columns each has
  int64_t tile() const { return columns * 32; }  // numbers

  Shape(Type type, int64_t T) : parts(type == Type::f32 ? 3 : 1), terms(T <= kStreamedRows ? 1 : parts) {
    const int64_t all = T * parts / terms;
    blocks = (all + 15) / 16;
    columns = terms > 1 || T > kStreamedRows ? 16 : (all + blocks - 1) / blocks;
  }
};

static size_t packed_size(Type type, int64_t T, int64_t I) {
  const Shape s(type, T);
  return size_t(s.blocks * steps(I) * s.terms * s.tile()) * sizeof(uint16_t);
}

static inline __m512i words(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
static inline __m256i top_halves(V v) { return (__m256i)__builtin_convertvector(reinterpret_cast<U>(v) >> 16, H16); }

// 32 inputs of one row as bfloat16: the numbers themselves, or the three parts that add up to them. Parts are cut off, not rounded: what is left
// is then exact, and never overflows.
static inline void parts(const Rows& x, int64_t t, int64_t i, int64_t I, __m512i* out) {
  const int n = int(I - i < 32 ? I - i : 32);
  if (x.type == Type::bf16) {
    const uint16_t* row = static_cast<const uint16_t*>(x.data) + t * x.stride + i;
    out[0] = _mm512_maskz_loadu_epi16(n == 32 ? 0xffffffffu : (1u << n) - 1, row);
    return;
  }
  V half[2];
  for (int j = 0; j < 2; j++) half[j] = n > 16 * j ? get(x.data, x.type, t * x.stride + i + 16 * j, n - 16 * j) : V{};
  for (int p = 0; p < 3; p++) {
    out[p] = words(top_halves(half[0]), top_halves(half[1]));
    for (int j = 0; j < 2; j++) {
      const V part = reinterpret_cast<V>(reinterpret_cast<U>(half[j]) & 0xffff0000u);
      const V left = half[j] - part;
      half[j] = left == left ? left : V{};  // behind an infinity nothing is left
    }
  }
}

// 16 columns' numbers, one vector each -> the tile
static inline void store_tile(__m512i* rows, const Shape& s, uint16_t* tile) {
  transpose(rows);
  const __mmask16 there = __mmask16((1u << s.columns) - 1);
  for (int i = 0; i < 16; i++) _mm512_mask_storeu_epi32(tile + 2 * s.columns * i, there, rows[i]);
}

static void pack_many(const Rows& x, const Shape& s, int64_t T, int64_t I, int64_t block, int64_t end, uint16_t* out) {
  for (const int64_t K = steps(I); block < end; block++)
    for (int64_t k = 0; k < K; k++) {
      __m512i rows[3][16] = {}, part[3];
      for (int i = 0; i < 16 && block * 16 + i < T; i++) {
        parts(x, block * 16 + i, k * kDepth, I, part);
        for (int p = 0; p < s.terms; p++) rows[p][i] = part[p];
      }
      for (int p = 0; p < s.terms; p++) store_tile(rows[p], s, out + ((block * K + k) * s.terms + p) * s.tile());
    }
}

// Column t * parts + p holds part p of token t.
static void pack_few(const Rows& x, const Shape& s, int64_t T, int64_t I, uint16_t* out) {
  const int64_t K = steps(I);
  for (int64_t k = 0; k < K; k++) {
    __m512i all[3 * kStreamedRows + 16] = {};
    for (int64_t t = 0; t < T; t++) parts(x, t, k * kDepth, I, all + t * s.parts);
    for (int64_t b = 0; b < s.blocks; b++) {
      __m512i rows[16] = {};
      for (int64_t i = 0; i < s.columns; i++) rows[i] = all[b * s.columns + i];
      store_tile(rows, s, out + (b * K + k) * s.tile());
    }
  }
}

static void pack(const Rows& x, int64_t T, int64_t I, int64_t block, int64_t end, void* out) {
  const Shape s(x.type, T);
  auto* to = static_cast<uint16_t*>(out);
  if (T > kStreamedRows) {
    pack_many(x, s, T, I, block, end, to);
  } else if (block == 0) {  // one thread does it all: it takes a few microseconds
    pack_few(x, s, T, I, to);
  }
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

// sums[b][n] = 16 rows of the weight x 16 columns, for both blocks of the panel and N blocks of columns
template <int P, int N>
static inline void products(const Panel& w, int64_t K, const uint16_t* x, const Shape& s, float (*sums)[2][256]) {
  _tile_zero(0);
  _tile_zero(1);
  if (N == 2) _tile_zero(2);
  if (N == 2) _tile_zero(3);
  const int64_t stride = w.stride * 2, tile_size = s.tile(), other = K * P * tile_size, x_stride = s.columns * 4;
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
      const uint16_t* tile = x + (k * P + p) * tile_size;
      _tile_loadd(6, tile, x_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (N == 2) {
        _tile_loadd(7, tile + other, x_stride);
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

// 16 rows of the weight x columns -> a vector for each column
static inline void turn(const float* sums, __m512i* r) {
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + 16 * i);
  transpose(r);
}

static inline void store(const Output& out, int64_t t, int64_t column, V v) {
  const int n = int(out.width - column < 16 ? out.width - column : 16);
  if (n > 0) put(out.out, out.type, t * out.stride + column, v, n);
}

static void few(const uint16_t* w, int64_t I, int64_t row, int64_t end, const uint16_t* x, const Shape& s, int64_t T, const Output& out,
                uint16_t* scratch) {
  alignas(64) float sums[2][2][256];
  __m512i r[16];
  V all[2][3 * kStreamedRows + 32];
  for (const int64_t K = steps(I); row < end; row += kRows) {
    const bool streamed = I % kDepth == 0 && row + kRows <= end;
    const Panel panel = streamed ? Panel{{w + row * I, w + (row + 16) * I}, kDepth, I, w + (row + kRows) * I} : copied(w, I, row, end, scratch);
    for (int64_t b = 0; b < s.blocks; b += 2) {
      const bool two = b + 1 < s.blocks;
      const uint16_t* columns = x + b * K * s.tile();
      two ? products<1, 2>(panel, K, columns, s, sums) : products<1, 1>(panel, K, columns, s, sums);
      for (int half = 0; half < 2; half++)
        for (int n = 0; n <= two; n++) {
          turn(sums[half][n], r);
          for (int64_t i = 0; i < s.columns; i++) all[half][(b + n) * s.columns + i] = reinterpret_cast<V>(r[i]);
        }
    }
    for (int half = 0; half < 2; half++)
      for (int64_t t = 0; t < T; t++) {
        const V* c = all[half] + t * s.parts;
        store(out, t, row + 16 * half, s.parts == 3 ? c[2] + c[1] + c[0] : c[0]);
      }
  }
}

template <int P>
static void many(const uint16_t* w, int64_t I, int64_t row, int64_t end, const uint16_t* x, const Shape& s, int64_t T, const Output& out,
                 uint16_t* scratch) {
  alignas(64) float sums[2][2][256];
  __m512i r[16];
  const int64_t K = steps(I);
  for (; row < end; row += kPanels * kRows) {
    Panel panels[kPanels];
    int64_t count = 0;
    for (int64_t at = row; count < kPanels && at < end; at += kRows, count++) panels[count] = copied(w, I, at, end, scratch + count * 2 * K * kTile);
    for (int64_t t = 0; t < T; t += 32)
      for (int64_t p = 0; p < count; p++) {
        const uint16_t* tokens = x + t / 16 * K * P * kTile;
        const bool two = T - t > 16;
        two ? products<P, 2>(panels[p], K, tokens, s, sums) : products<P, 1>(panels[p], K, tokens, s, sums);
        for (int half = 0; half < 2; half++)
          for (int n = 0; n <= two; n++) {
            turn(sums[half][n], r);
            for (int64_t i = 0; i < 16 && t + 16 * n + i < T; i++) store(out, t + 16 * n + i, row + p * kRows + 16 * half, reinterpret_cast<V>(r[i]));
          }
      }
  }
}

static size_t product_scratch(int64_t I) { return size_t(kPanels * 2 * steps(I) * kTile) * sizeof(uint16_t); }

static void product(const uint16_t* w, int64_t I, int64_t row, int64_t end, const void* x, Type type, int64_t T, const Output& out, void* scratch) {
  const Shape s(type, T);
  TileShape shape;
  for (int i = 0; i < 8; i++) shape.bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : s.columns * 4);  // 0 .. 3 sums, 4, 5 weight, 6, 7 activations
  _tile_loadconfig(&shape);
  const auto* columns = static_cast<const uint16_t*>(x);
  auto* panels = static_cast<uint16_t*>(scratch);
  if (T <= kStreamedRows) {
    few(w, I, row, end, columns, s, T, out, panels);
  } else if (type == Type::f32) {
    many<3>(w, I, row, end, columns, s, T, out, panels);
  } else {
    many<1>(w, I, row, end, columns, s, T, out, panels);
  }
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
