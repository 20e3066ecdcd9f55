// Products of bfloat16 weights, as they are stored, on AMX tiles, exact to float32: tiles multiply bfloat16 numbers and add in float32, and a
// float32 activation is the sum of three bfloat16 ones (8 + 8 + 8 bits), so each weight is met three times and nothing of it is rounded away.
//
// Of two operands a tile takes one by rows and the other by pairs of rows. Up to kStreamedRows tokens the weights are the one by rows: they
// stream from memory once, unpacked, and the tokens are arranged, the small side. Beyond, it is the tokens, and weights are arranged in panels.
// A tile adds the same products in the same order either way, so a row's result does not depend on the rows beside it.
#define ERNIE_ISA amx_tiles
#include <immintrin.h>

#include "rows.h"
#include "tiles.h"

namespace ernie {
namespace amx_tiles {

using tiles::TileShape;
using tiles::transpose;

constexpr int64_t kDepth = 32;  // inputs of one tile
constexpr int64_t kTile = 512;  // bfloat16 numbers of one tile
constexpr int64_t kAhead = 12;  // tiles that are fetched before they are needed

static int64_t steps(int64_t I) { return (I + kDepth - 1) / kDepth; }
static const uint16_t* row_of(const Quantised& x, int64_t t) { return reinterpret_cast<const uint16_t*>(x.value + t * x.row_bytes()); }
static const uint16_t* block_of(const Packed& w, int64_t block) { return reinterpret_cast<const uint16_t*>(w.value) + block * 16 * w.I; }

// 16 rows x 32 inputs of a block, zeros where the weight ends
static inline void load_rows(const Packed& w, int64_t block, int64_t k, __m512i* rows) {
  const uint16_t* from = block_of(w, block) + k * kDepth;
  const int64_t left = w.I - k * kDepth;
  const __mmask32 inputs = left >= kDepth ? 0xffffffffu : (1u << left) - 1;
  for (int64_t r = 0; r < 16; r++) rows[r] = _mm512_maskz_loadu_epi16(block * 16 + r < w.O ? inputs : 0, from + r * w.I);
}

// ---- few tokens: tile = 16 outputs x columns, a column for each token

// Tiles of pairs of inputs x columns. A single row is such a tile as it stands.
struct Columns {
  int64_t blocks, columns;           // tiles side by side, and how many columns each has
  int64_t tile() const { return columns * 32; }  // numbers

  explicit Columns(int64_t T) : blocks((T + 15) / 16), columns((T + blocks - 1) / blocks) {}
};

static size_t arranged_bytes(const Quantised& x) {
  const Columns c(x.T);
  return x.T == 1 || x.T > kStreamedRows ? 0 : size_t(c.blocks * steps(x.I) * x.halves * c.tile()) * sizeof(uint16_t);
}

// [blocks][I / 32][parts] tiles
static void arrange(const Quantised& x, void* arranged) {
  const Columns c(x.T);
  auto* to = static_cast<uint16_t*>(arranged);
  const __mmask16 there = __mmask16((1u << c.columns) - 1);
  for (int64_t b = 0; b < c.blocks; b++)
    for (int64_t k = 0; k < steps(x.I); k++)
      for (int p = 0; p < x.halves; p++, to += c.tile()) {
        __m512i rows[16];
        for (int64_t i = 0; i < 16; i++) {
          const int64_t t = b * c.columns + i;
          rows[i] = i < c.columns && t < x.T ? _mm512_loadu_si512(row_of(x, t) + p * x.I + k * kDepth) : _mm512_setzero_si512();
        }
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_mask_storeu_epi32(to + 2 * c.columns * i, there, rows[i]);
      }
}

// One block of the weight: tiles `next` numbers apart along the inputs, rows `stride` apart.
struct Rows16 {
  const uint16_t* at;
  int64_t next, stride;
  const uint16_t* after;  // the block that comes next, to be fetched; null: the block is a copy
};

static Rows16 streamed(const Packed& w, int64_t block, int64_t after, uint16_t* copy) {
  if (w.I % kDepth == 0 && block * 16 + 16 <= w.O) return {block_of(w, block), kDepth, w.I, block_of(w, after)};
  for (int64_t k = 0; k < steps(w.I); k++) {
    __m512i rows[16];
    load_rows(w, block, k, rows);
    for (int r = 0; r < 16; r++) _mm512_storeu_si512(copy + k * kTile + r * kDepth, rows[r]);
  }
  return {copy, kTile, kDepth, nullptr};
}

// The rows lie far apart, and the machine foresees only some of them.
static inline void fetch(const Rows16& w, int64_t k, int64_t K) {
  if (!w.after) return;
  const uint16_t* from = k + kAhead < K ? w.at + (k + kAhead) * kDepth : w.after + (k + kAhead - K) % K * kDepth;
  for (int i = 0; i < 16; i++) _mm_prefetch(reinterpret_cast<const char*>(from + i * w.stride), _MM_HINT_T0);
}

// sums[n][b]: two blocks of the weight x N blocks of columns
template <int N>
static inline void stream(const Rows16* w, const Quantised& x, const void* arranged, float (*sums)[2][256]) {
  const Columns c(x.T);
  const bool alone = x.T == 1;
  const auto* tokens = alone ? row_of(x, 0) : static_cast<const uint16_t*>(arranged);
  const int64_t K = steps(x.I), parts = x.halves;
  const int64_t next = alone ? kDepth : parts * c.tile(), part = alone ? x.I : c.tile(), other = K * parts * c.tile(), stride = c.columns * 4;
  _tile_zero(0);
  _tile_zero(1);
  if (N == 2) _tile_zero(2);
  if (N == 2) _tile_zero(3);
  for (int64_t k = 0; k < K; k++) {
    fetch(w[0], k, K);
    fetch(w[1], k, K);
    _tile_loadd(4, w[0].at + k * w[0].next, w[0].stride * 2);
    _tile_loadd(5, w[1].at + k * w[1].next, w[1].stride * 2);
    for (int64_t p = 0; p < parts; p++) {
      const uint16_t* tile = tokens + k * next + p * part;
      _tile_loadd(6, tile, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (N == 2) {
        _tile_loadd(7, tile + other, stride);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums[0][0], 64);
  _tile_stored(1, sums[0][1], 64);
  if (N == 2) _tile_stored(2, sums[1][0], 64);
  if (N == 2) _tile_stored(3, sums[1][1], 64);
}

// 16 outputs x columns -> a row of 16 outputs for each column
static inline void turn(float* sums) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(sums + 16 * i);
  transpose(r);
  for (int i = 0; i < 16; i++) _mm512_store_si512(sums + 16 * i, r[i]);
}

static void few(const Packed& w, const Quantised& x, const void* arranged, int64_t block, int64_t end, const Output& out, uint16_t* scratch) {
  alignas(64) float sums[2][2][256];
  const bool pairs = out.finish == Finish::swiglu;
  const Columns c(x.T);
  const int64_t at_once = pairs ? 1 : 2, half = w.blocks() / 2;
  for (; block < end; block += at_once) {
    const int64_t second = pairs ? half + block : block + 1 < end ? block + 1 : block;
    const Rows16 rows[2] = {streamed(w, block, block + at_once, scratch), streamed(w, second, second + at_once, scratch + steps(w.I) * kTile)};
    c.blocks == 2 ? stream<2>(rows, x, arranged, sums) : stream<1>(rows, x, arranged, sums);
    for (int64_t n = 0; n < c.blocks; n++) {
      turn(sums[n][0]);
      turn(sums[n][1]);
      for (int64_t i = 0, t = n * c.columns; i < c.columns && t < x.T; i++, t++)
        if (pairs) {
          finish_pair(out, t, block * 16, sums[n][0] + 16 * i, sums[n][1] + 16 * i);
        } else {
          finish_16(out, t, block * 16, sums[n][0] + 16 * i);
          if (second > block) finish_16(out, t, second * 16, sums[n][1] + 16 * i);
        }
    }
  }
}

// ---- many tokens: tile = 16 tokens x 16 outputs

// A block as tiles of pairs of inputs x 16 outputs.
static void turn_block(const Packed& w, int64_t block, uint16_t* to) {
  for (int64_t k = 0; k < steps(w.I); k++, to += kTile) {
    __m512i rows[16];
    load_rows(w, block, k, rows);
    transpose(rows);
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, rows[i]);
  }
}

// Sums of 32 tokens x two blocks of outputs that wait to be stored: a few rows of them after every step of the next products, which run meanwhile.
struct Finisher {
  const Output& out;
  alignas(64) float sums[2][4][256];  // being finished and being made: 16 tokens each, two blocks side by side
  int64_t t = 0, blocks[2] = {0, 0}, done = 0, rows = 0;
  int turn = 0;

  explicit Finisher(const Output& output) : out(output) {}
  void some(int64_t count) {
    for (; count > 0 && done < rows; count--, done++) {
      const float* first = sums[turn][done / 16 * 2] + done % 16 * 16;
      if (out.finish == Finish::swiglu) {
        finish_pair(out, t + done, blocks[0] * 16, first, first + 256);
      } else {
        finish_16(out, t + done, blocks[0] * 16, first);
        if (blocks[1] > blocks[0]) finish_16(out, t + done, blocks[1] * 16, first + 256);
      }
    }
  }
  float (*space())[256] { return sums[turn ^ 1]; }
  // What was made is what is to be finished.
  void take(int64_t first_token, int64_t count, int64_t first, int64_t second) {
    some(rows);
    turn ^= 1, t = first_token, rows = count, done = 0, blocks[0] = first, blocks[1] = second;
  }
};

// H x 16 tokens times two blocks
template <int H>
static inline void tile_products(const Quantised& x, int64_t t, const uint16_t* w0, const uint16_t* w1, Finisher& f) {
  const int64_t K = steps(x.I), stride = x.row_bytes(), rows_a_step = (32 + K - 1) / K;
  const uint16_t *top = row_of(x, t), *bottom = row_of(x, t + 16);
  _tile_zero(0);
  _tile_zero(1);
  if (H == 2) _tile_zero(2);
  if (H == 2) _tile_zero(3);
  for (int64_t k = 0; k < K; k++) {
    _tile_loadd(6, w0 + k * kTile, 64);
    _tile_loadd(7, w1 + k * kTile, 64);
    for (int64_t p = 0; p < x.halves; p++) {
      _tile_loadd(4, top + p * x.I + k * kDepth, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (H == 2) {
        _tile_loadd(5, bottom + p * x.I + k * kDepth, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    f.some(rows_a_step);
  }
  float (*to)[256] = f.space();
  _tile_stored(0, to[0], 64);
  _tile_stored(1, to[1], 64);
  if (H == 2) _tile_stored(2, to[2], 64);
  if (H == 2) _tile_stored(3, to[3], 64);
}

// Tiles read whole: behind the last token there are rows that nobody looks at, see `kTokenPadding`.
static void many(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, uint16_t* panel) {
  const bool pairs = out.finish == Finish::swiglu;
  const int64_t half = w.blocks() / 2, size = steps(w.I) * kTile, at_once = pairs ? kPanelBlocks / 2 : kPanelBlocks;
  Finisher finisher(out);
  for (; block < end; block += at_once) {
    const int64_t count = end - block < at_once ? end - block : at_once, tiles = pairs ? count : (count + 1) / 2;
    int64_t first[kPanelBlocks / 2], second[kPanelBlocks / 2];
    for (int64_t i = 0; i < tiles; i++) {
      first[i] = pairs ? block + i : block + 2 * i;
      second[i] = pairs ? half + first[i] : first[i] + 1 < end ? first[i] + 1 : first[i];
      turn_block(w, first[i], panel + 2 * i * size);
      turn_block(w, second[i], panel + (2 * i + 1) * size);
    }
    for (int64_t t = 0; t < x.T; t += 32)
      for (int64_t i = 0; i < tiles; i++) {
        const int64_t rows = x.T - t < 32 ? x.T - t : 32;
        const uint16_t* w0 = panel + 2 * i * size;
        rows > 16 ? tile_products<2>(x, t, w0, w0 + size, finisher) : tile_products<1>(x, t, w0, w0 + size, finisher);
        finisher.take(t, rows, first[i], second[i]);
      }
  }
  finisher.some(32);
}

static size_t whole_scratch(const Packed& w) { return size_t(kPanelBlocks * steps(w.I) * kTile) * sizeof(uint16_t); }

static void whole(const Packed& w, const Quantised& x, const void* arranged, int64_t block, int64_t end, const Output& out, void* scratch) {
  const bool streams = x.T <= kStreamedRows;
  const uint16_t columns = streams ? uint16_t(Columns(x.T).columns * 4) : 64;
  TileShape shape;
  for (int i = 0; i < 8; i++) shape.bytes[i] = i == 4 || i == 5 ? 64 : columns;  // 0 .. 3 sums, 4, 5 by rows, 6, 7 by pairs of rows
  _tile_loadconfig(&shape);
  auto* space = static_cast<uint16_t*>(scratch);
  streams ? few(w, x, arranged, block, end, out, space) : many(w, x, block, end, out, space);
  _tile_release();
}

}  // namespace amx_tiles

const FloatKernels& amx_floats() {
  static const FloatKernels kernels = [] {
    FloatKernels k = avx512_floats();
    k.halves = true;
    k.arranged_bytes = amx_tiles::arranged_bytes;
    k.arrange = amx_tiles::arrange;
    k.whole_scratch = amx_tiles::whole_scratch;
    k.whole = amx_tiles::whole;
    return k;
  }();
  return kernels;
}

}  // namespace ernie
