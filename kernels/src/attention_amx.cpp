// Attention over pages with AMX bfloat16 tiles (16 x 32 numbers), for prompts and single queries alike.
//
// The queries of all heads that share a key head, and of neighbouring tokens, make the 16 rows of a tile. Keys are read from their pages as
// they lie; values are interleaved by pairs once for all tiles of a call. Keys are taken in blocks of 128 counted from the start of the
// sequence, each with a maximum of its own, and joined in order: a row's result depends on its own query and keys alone, however a prompt is
// cut into steps and whoever computes a block. Sums are float32, weights are rounded to bfloat16.
#define ERNIE_ISA attention_amx
#include <immintrin.h>

#include <initializer_list>

#include "rows.h"
#include "tiles.h"

namespace ernie {
namespace attention_amx {

using tiles::TileShape;
using tiles::transpose;

constexpr int64_t kBlock = 128;

// What 16 rows have of a block of keys, or of all blocks so far: maximum, sum of weights, weighted values.
struct Part {
  alignas(64) float most[16], sum[16];
  alignas(64) float out[16][128];
};

// 16 rows of queries on their way: tiles of the turned queries, and what was gathered so far.
struct Tile {
  alignas(64) uint16_t q[4][16][32];
  alignas(64) int32_t last[16];  // the last key each row sees
  int64_t longest;
  Part whole;
};

struct Work {
  alignas(64) uint16_t values[kBlock / 32][8][16][32];
  alignas(64) float scores[kBlock][16];
  alignas(64) uint16_t weights[kBlock / 32][16][32];
  Part part;
  Tile tiles[kTileRows / 16];
};

static size_t scratch_bytes() { return sizeof(Work); }

static void begin(Part& part) {
  for (int i = 0; i < 16; i++) part.most[i] = -INFINITY, part.sum[i] = 0.0f;
  std::memset(part.out, 0, sizeof(part.out));
}

// Keys that rows (token first + r / G, head r % G) of tile number `n` see.
static void look(Tile& tile, const PagedJob& job, int64_t first, int64_t rows, int64_t n) {
  const int64_t G = job.N / job.K;
  tile.longest = 0;
  for (int i = 0; i < 16; i++) {
    const int64_t r = n * 16 + i;
    const int64_t length = r < rows * G ? job.lengths[first + r / G] : 1;
    tile.last[i] = int32_t(length - 1);
    if (r < rows * G && length > tile.longest) tile.longest = length;
  }
}

static void fill(Tile& tile, const PagedJob& job, int64_t first, int64_t rows, int64_t kv_head, int64_t n) {
  const int64_t G = job.N / job.K, H = job.H;
  look(tile, job, first, rows, n);
  for (int64_t h = 0; h < H / 32; h++) {
    __m512i row[16];
    for (int i = 0; i < 16; i++) {
      const int64_t r = n * 16 + i;
      row[i] = _mm512_setzero_si512();
      if (r < rows * G)
        row[i] = _mm512_loadu_si512(static_cast<const uint16_t*>(job.q) + ((first + r / G) * job.N + kv_head * G + r % G) * H + h * 32);
    }
    transpose(row);
    for (int i = 0; i < 16; i++) _mm512_store_si512(tile.q[h][i], row[i]);
  }
}

// Values of keys at .. at + kBlock by pairs; what lies behind `length` counts as zero, whatever stands there.
static void pack_values(Work& work, const PagedJob& job, const int64_t* pages, int64_t kv_head, int64_t at, int64_t length) {
  const int64_t stride = job.K * job.H;
  for (int64_t pair = 0; pair < kBlock / 2; pair++) {
    const int64_t key = at + pair * 2;
    if (pair % 16 == 0 && key >= length) break;  // whole tiles that nobody multiplies
    const auto* v = static_cast<const uint16_t*>(job.values) + (key < length ? (pages[key / job.page_size] * job.page_size + key % job.page_size) * stride + kv_head * job.H : 0);
    for (int64_t h = 0; h < job.H / 16; h++) {
      __m512i both = _mm512_setzero_si512();
      if (key < length) both = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + h * 16)));
      if (key + 1 < length) {
        const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + stride + h * 16)));
        both = _mm512_or_si512(both, _mm512_slli_epi32(second, 16));
      }
      _mm512_store_si512(work.values[pair / 16][h][pair % 16], both);
    }
  }
}

// Turned scores [key][row] of `count` keys from `at` on, unscaled.
static void score(Work& work, const Tile& tile, const PagedJob& job, const int64_t* pages, int64_t kv_head, int64_t at, int64_t count) {
  const int64_t stride = job.K * job.H, parts = job.H / 32;
  _tile_loadd(4, tile.q[0], 64);
  if (parts > 1) _tile_loadd(5, tile.q[1], 64);
  if (parts > 2) _tile_loadd(6, tile.q[2], 64);
  if (parts > 3) _tile_loadd(7, tile.q[3], 64);
  for (int64_t key = 0; key < count; key += 16) {  // pages hold whole sixteens
    const int64_t slot = pages[(at + key) / job.page_size] * job.page_size + (at + key) % job.page_size;
    const auto* k = static_cast<const uint16_t*>(job.keys) + slot * stride + kv_head * job.H;
    _tile_zero(0);
    _tile_loadd(1, k, stride * 2);
    _tile_dpbf16ps(0, 1, 4);
    if (parts > 1) {
      _tile_loadd(2, k + 32, stride * 2);
      _tile_dpbf16ps(0, 2, 5);
    }
    if (parts > 2) {
      _tile_loadd(3, k + 64, stride * 2);
      _tile_dpbf16ps(0, 3, 6);
    }
    if (parts > 3) {
      _tile_loadd(1, k + 96, stride * 2);
      _tile_dpbf16ps(0, 1, 7);
    }
    _tile_stored(0, work.scores[key], 64);
  }
}

// Scores to weights, as tiles of bfloat16; maximum and sum of the block's weights. A row that sees none of the keys has none.
static void weigh(Work& work, const Tile& tile, Part& part, int64_t H, int64_t at, int64_t count) {
  const V by = V{} + 1.0f / std::sqrt(float(H));
  const I last = *reinterpret_cast<const I*>(tile.last) - int32_t(at);  // of this block
  int32_t least = last[0];
  for (int i = 1; i < 16; i++) least = last[i] < least ? last[i] : least;
  V most = V{} - INFINITY, sum = {};
  for (int64_t key = 0; key < count; key++) {
    V s = load(work.scores[key]) * by;
    if (key > least) s = last < int32_t(key) ? V{} - INFINITY : s;
    std::memcpy(work.scores[key], &s, 64);
    most = s > most ? s : most;
  }
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t at_key = 0; at_key < count; at_key += 32) {
    __m512i pairs[16];
    for (int64_t p = 0; p < 16; p++) {
      V two[2] = {};
      for (int64_t j = 0; j < 2; j++) {
        const int64_t key = at_key + p * 2 + j;
        if (key >= count) continue;
        two[j] = exp_approx(load(work.scores[key]) - most);
        if (key > least) two[j] = last < int32_t(key) ? V{} : two[j];
        sum += two[j];
      }
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(&two[1]), _mm512_loadu_ps(&two[0]));
      pairs[p] = _mm512_permutexvar_epi16(order, reinterpret_cast<const __m512i&>(both));
    }
    transpose(pairs);
    for (int i = 0; i < 16; i++) _mm512_store_si512(work.weights[at_key / 32][i], pairs[i]);
  }
  std::memcpy(part.most, &most, 64);
  std::memcpy(part.sum, &sum, 64);
}

static void gather(const Work& work, Part& part, int64_t H, int64_t count) {
  _tile_loadd(4, work.weights[0], 64);
  if (count > 32) _tile_loadd(5, work.weights[1], 64);
  if (count > 64) _tile_loadd(6, work.weights[2], 64);
  if (count > 96) _tile_loadd(7, work.weights[3], 64);
  for (int64_t h = 0; h < H / 16; h++) {
    _tile_zero(0);
    _tile_loadd(1, work.values[0][h], 64);
    _tile_dpbf16ps(0, 4, 1);
    if (count > 32) {
      _tile_loadd(2, work.values[1][h], 64);
      _tile_dpbf16ps(0, 5, 2);
    }
    if (count > 64) {
      _tile_loadd(3, work.values[2][h], 64);
      _tile_dpbf16ps(0, 6, 3);
    }
    if (count > 96) {
      _tile_loadd(1, work.values[3][h], 64);
      _tile_dpbf16ps(0, 7, 1);
    }
    _tile_stored(0, part.out[0] + h * 16, sizeof(part.out[0]));
  }
}

// One function for both ways to get here, so that both give the same bits.
[[gnu::noinline]] static void join(Part& whole, const Part& part, int64_t rows, int64_t H) {
  const V before = load(whole.most), here = load(part.most), most = here > before ? here : before;
  const V keep = exp_approx(before - most), take = exp_approx(here - most);
  const V sum = load(whole.sum) * keep + load(part.sum) * take;
  std::memcpy(whole.most, &most, 64);
  std::memcpy(whole.sum, &sum, 64);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t h = 0; h < H; h += 16) {
      const V v = load(whole.out[i] + h) * keep[i] + load(part.out[i] + h) * take[i];
      std::memcpy(whole.out[i] + h, &v, 64);
    }
}

static void store(const Part& whole, const PagedJob& job, int64_t first, int64_t rows, int64_t kv_head, int64_t n) {
  const int64_t G = job.N / job.K;
  for (int64_t i = 0; i < 16 && n * 16 + i < rows * G; i++) {
    const int64_t r = n * 16 + i;
    const float by = 1.0f / whole.sum[i];
    for (int64_t h = 0; h < job.H; h += 16)
      put(job.out, Type::bf16, ((first + r / G) * job.N + kv_head * G + r % G) * job.H + h, load(whole.out[i] + h) * by, 16);
  }
}

static const int64_t* pages_of(const PagedJob& job, int64_t first) { return job.pages + (job.table ? job.table[first] : first) * job.max_pages; }

static int64_t rows_in(const PagedJob& job, int64_t rows, int64_t n) {
  const int64_t left = rows * (job.N / job.K) - n * 16;
  return left < 16 ? left : 16;
}

// The block of keys from `at` on for tile `tile`, whose values are packed.
static void block(Work& work, const Tile& tile, Part& part, const PagedJob& job, const int64_t* pages, int64_t kv_head, int64_t at) {
  const int64_t count = tile.longest - at < kBlock ? tile.longest - at : kBlock;
  score(work, tile, job, pages, kv_head, at, count);
  weigh(work, tile, part, job.H, at, count);
  gather(work, part, job.H, count);
}

static void attend(const PagedJob& job, int64_t first, int64_t rows, int64_t kv_head, void* scratch) {
  Work& work = *static_cast<Work*>(scratch);
  const int64_t tiles = (rows * (job.N / job.K) + 15) / 16;
  const int64_t* pages = pages_of(job, first);
  int64_t length = 0;
  for (int64_t n = 0; n < tiles; n++) {
    fill(work.tiles[n], job, first, rows, kv_head, n);
    begin(work.tiles[n].whole);
    length = work.tiles[n].longest > length ? work.tiles[n].longest : length;
  }
  const TileShape shape;
  _tile_loadconfig(&shape);
  for (int64_t at = 0; at < length; at += kBlock) {
    pack_values(work, job, pages, kv_head, at, length);
    for (int64_t n = 0; n < tiles; n++) {
      Tile& tile = work.tiles[n];
      if (tile.longest <= at) continue;
      block(work, tile, work.part, job, pages, kv_head, at);
      join(tile.whole, work.part, rows_in(job, rows, n), job.H);
    }
  }
  _tile_release();
  for (int64_t n = 0; n < tiles; n++) store(work.tiles[n].whole, job, first, rows, kv_head, n);
}

static size_t part_bytes(const PagedJob& job, int64_t rows) { return size_t((rows * (job.N / job.K) + 15) / 16) * sizeof(Part); }

static void attend_block(const PagedJob& job, int64_t first, int64_t rows, int64_t kv_head, int64_t number, void* parts, void* scratch) {
  Work& work = *static_cast<Work*>(scratch);
  const int64_t tiles = (rows * (job.N / job.K) + 15) / 16, at = number * kBlock;
  const int64_t* pages = pages_of(job, first);
  const TileShape shape;
  _tile_loadconfig(&shape);
  pack_values(work, job, pages, kv_head, at, job.lengths[first + rows - 1]);
  for (int64_t n = 0; n < tiles; n++) {
    Tile& tile = work.tiles[0];
    fill(tile, job, first, rows, kv_head, n);
    if (tile.longest > at) block(work, tile, static_cast<Part*>(parts)[n], job, pages, kv_head, at);
  }
  _tile_release();
}

static void join_blocks(const PagedJob& job, int64_t first, int64_t rows, int64_t kv_head, const void* parts, size_t stride, void* scratch) {
  Tile& tile = static_cast<Work*>(scratch)->tiles[0];
  const int64_t tiles = (rows * (job.N / job.K) + 15) / 16;
  for (int64_t n = 0; n < tiles; n++) {
    look(tile, job, first, rows, n);
    begin(tile.whole);
    for (int64_t at = 0; at < tile.longest; at += kBlock)
      join(tile.whole, reinterpret_cast<const Part*>(static_cast<const char*>(parts) + size_t(at / kBlock) * stride)[n], rows_in(job, rows, n), job.H);
    store(tile.whole, job, first, rows, kv_head, n);
  }
}

static void fetch(const PagedJob& job, int64_t first, int64_t kv_head, int64_t number, int64_t length) {
  const int64_t* pages = pages_of(job, first);
  const int64_t end = (number + 1) * kBlock < length ? (number + 1) * kBlock : length;
  for (const void* side : {job.keys, job.values})
    for (int64_t key = number * kBlock; key < end; key++) {
      const auto* row = static_cast<const char*>(side) + ((pages[key / job.page_size] * job.page_size + key % job.page_size) * job.K + kv_head) * job.H * 2;
      for (int64_t at = 0; at < job.H * 2; at += 64) _mm_prefetch(row + at, _MM_HINT_T1);
    }
}

static bool takes(const PagedJob& job) {
  return job.type == Type::bf16 && job.cache_type == Type::bf16 && job.H % 32 == 0 && job.H <= 128 && job.page_size % 16 == 0 && job.N / job.K <= kTileRows;
}

}  // namespace attention_amx

const TiledAttention& amx_attention() {
  static const TiledAttention kernels{attention_amx::takes,        attention_amx::scratch_bytes, attention_amx::attend, attention_amx::kBlock,
                                      attention_amx::part_bytes,   attention_amx::fetch,         attention_amx::attend_block,
                                      attention_amx::join_blocks};
  return kernels;
}

}  // namespace ernie
