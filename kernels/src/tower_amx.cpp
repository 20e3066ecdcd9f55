// Products and row work of a vision tower on AMX tiles; the layout is described in tower.h.
//
// A product takes a panel of 256 outputs, copied tile by tile so that it stays in the second cache, past all strips of patches; the panel's tiles
// pass by the first cache, which is left to the strips. While tiles multiply, the vector units finish the results of the tiles before, one pair
// of rows a step, the strips that come next are fetched, and the panel that comes next is copied.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "tower_tiles.h"

namespace ernie {
namespace tower_amx {

using namespace tower_tiles;

constexpr int64_t kPanelSteps = 40;  // of 16 tiles of outputs: the second cache

static void columns(const uint16_t* rows, int64_t stride, int64_t D, const Patches& p, int64_t strip, uint16_t* out) {
  const int64_t frame = strip / p.strips_of_frame(), at = strip % p.strips_of_frame() * kStrip;
  const uint16_t* first = rows + (frame * p.count + at) * stride;
  const int64_t there = p.count - at;
  for (int64_t i = 0; i < D; i += 32) {
    __m512i r[16];
    for (int j = 0; j < 16; j++) r[j] = j < there ? _mm512_loadu_si512(first + j * stride + i) : _mm512_setzero_si512();
    transpose(r);
    for (int j = 0; j < 16; j++) _mm512_store_si512(out + i * 16 + j * 32, r[j]);
  }
}

static void rows(const uint16_t* columns, int64_t D, const Patches& p, int64_t strip, uint16_t* rows, int64_t stride) {
  const int64_t frame = strip / p.strips_of_frame(), at = strip % p.strips_of_frame() * kStrip;
  uint16_t* first = rows + (frame * p.count + at) * stride;
  const int64_t there = std::min(p.count - at, kStrip);
  for (int64_t i = 0; i < D; i += 32) {
    __m512i r[16];
    for (int j = 0; j < 16; j++) r[j] = _mm512_load_si512(columns + i * 16 + j * 32);
    transpose(r);
    for (int64_t j = 0; j < there; j++) _mm512_storeu_si512(first + j * stride + i, r[j]);
  }
}

static void norm(const uint16_t* columns, int64_t D, const float* gain, float eps, uint16_t* out) {
  const __m512 share = _mm512_set1_ps(1.0f / float(D));
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < D; i += 2) {
    const Pair x = load_pair(columns + i * 16);
    sums[0] = _mm512_add_ps(sums[0], x.even), sums[1] = _mm512_add_ps(sums[1], x.odd);
  }
  const __m512 mean = _mm512_mul_ps(_mm512_add_ps(sums[0], sums[1]), share);
  for (int64_t i = 0; i < D; i += 2) {
    const Pair x = load_pair(columns + i * 16);
    const __m512 even = _mm512_sub_ps(x.even, mean), odd = _mm512_sub_ps(x.odd, mean);
    squares[0] = _mm512_fmadd_ps(even, even, squares[0]), squares[1] = _mm512_fmadd_ps(odd, odd, squares[1]);
  }
  const __m512 variance = _mm512_mul_ps(_mm512_add_ps(squares[0], squares[1]), share);
  const __m512 by = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_add_ps(variance, _mm512_set1_ps(eps))));
  for (int64_t i = 0; i < D; i += 2) {
    const Pair x = load_pair(columns + i * 16);
    const __m512 even = _mm512_mul_ps(_mm512_sub_ps(x.even, mean), by), odd = _mm512_mul_ps(_mm512_sub_ps(x.odd, mean), by);
    _mm512_store_si512(out + i * 16, words_of({_mm512_fmadd_ps(even, _mm512_set1_ps(gain[i]), _mm512_set1_ps(gain[D + i])),
                                              _mm512_fmadd_ps(odd, _mm512_set1_ps(gain[i + 1]), _mm512_set1_ps(gain[D + i + 1]))}));
  }
}

// As `quantise_group` of rows.h, for 16 patches at once and all of their inputs in one group.
static void quantise(const uint16_t* columns, int64_t D, char* out, float* scale) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();  // compared as integers, where NaN is the largest
  for (int64_t i = 0; i < D; i += 2) {
    const Pair x = load_pair(columns + i * 16);
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x.even), magnitude));
    most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(x.odd), magnitude));
  }
  const __m512 largest = _mm512_castsi512_ps(most);
  const __mmask16 finite = _mm512_cmplt_epi32_mask(most, _mm512_set1_epi32(0x7f800000));
  const __mmask16 sound = _mm512_mask_cmp_ps_mask(finite, largest, _mm512_set1_ps(1e-30f), _CMP_GE_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(sound, _mm512_set1_ps(127.0f), largest);
  __m512 scales = _mm512_maskz_div_ps(sound, largest, _mm512_set1_ps(127.0f));
  scales = _mm512_mask_mov_ps(_mm512_set1_ps(NAN), finite, scales);
  _mm512_storeu_ps(scale, scales);
  const __m512i byte = _mm512_set1_epi32(255);
  for (int64_t i = 0; i < D; i += 4) {
    __m512i quad = _mm512_setzero_si512();
    for (int j = 0; j < 2; j++) {
      const Pair x = load_pair(columns + (i + 2 * j) * 16);
      const __m512i even = _mm512_maskz_cvtps_epi32(sound, _mm512_mul_ps(x.even, inverse));
      const __m512i odd = _mm512_maskz_cvtps_epi32(sound, _mm512_mul_ps(x.odd, inverse));
      const __m512i both = _mm512_or_si512(_mm512_and_si512(even, byte), _mm512_slli_epi32(_mm512_and_si512(odd, byte), 8));
      quad = j ? _mm512_or_si512(quad, _mm512_slli_epi32(both, 16)) : both;
    }
    _mm512_store_si512(out + i * 16, quad);
  }
}

// Copies tiles of outputs o .. end, steps k .. k + count, one behind the other, 16 outputs of 64 bytes of inputs at a time.
struct Copy {
  const TowerMatrix* w;
  int64_t o, end, k, count;
  char* to;
  int64_t s = 0;

  bool over() const { return o >= end; }
  int64_t tiles() const { return (end - o) / 16 * count; }

  void step() {
    __m512i r[16];
    if (w->bytes()) {
      const __m512i sign = _mm512_set1_epi8(-128);
      const char* from = reinterpret_cast<const char*>(w->packed.value) + o / 16 * w->packed.block_bytes() + (k + s) * kTileBytes;
      for (int64_t j = 0; j < 16; j++) r[j] = _mm512_xor_si512(_mm512_loadu_si512(from + j * 64), sign);
      transpose(r);
    } else {
      for (int64_t j = 0; j < 16; j++) r[j] = _mm512_loadu_si512(w->whole + (o + j) * w->I + (k + s) * 32);
    }
    for (int64_t j = 0; j < 16; j++) _mm512_store_si512(to + j * 64, r[j]);
    to += kTileBytes;
    if (++s == count) s = 0, o += 16;
  }

  void all() {
    while (!over()) step();
  }
};

template <bool bytes>
struct Finisher {
  const TowerProduct& p;
  alignas(64) float sums[2][2][16][16];  // [tile of outputs][strip]
  float scale[512], bias[512];           // of the panel's outputs
  int64_t first, unit = 32, o = 0, strip = 0;

  Finisher(const TowerProduct& product, int64_t from, int64_t end) : p(product), first(from) {
    for (int64_t i = from; i < end; i++) {
      bias[i - from] = p.w.bias ? _mm512_cvtss_f32(pair_of(_mm512_set1_epi32(int(uint32_t(p.w.bias[i]) << 16))).odd) : 0.0f;
      if (bytes) scale[i - from] = _cvtsh_ss(p.w.packed.scale[i]);  // one group: [O / 16][1][16]
    }
  }

  __m512 value(int tile, int half, int row, int64_t at, __m512 by) const {
    const float* c = sums[tile][half][row];
    __m512 v = _mm512_load_ps(c);
    if (bytes) v = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(v)), _mm512_mul_ps(by, _mm512_set1_ps(scale[at])));
    return _mm512_add_ps(v, _mm512_set1_ps(bias[at]));
  }

  static __m512 gelu(__m512 x) {  // x / (1 + 2^(-1.702 log2(e) x)); 1.0 / y to 14 bits
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(exp2_quick(_mm512_mul_ps(x, _mm512_set1_ps(-1.702f * 1.44269504f))), _mm512_set1_ps(1.0f))));
  }

  // One pair of rows of one strip.
  void step() {
    const int half = unit & 1, row = unit / 2;
    const int64_t at = o - first + 2 * row;
    const __m512 by = bytes ? _mm512_loadu_ps(p.x_scale + (strip + half) * 16) : _mm512_setzero_ps();
    Pair v{value(row / 8, half, row % 8 * 2, at, by), value(row / 8, half, row % 8 * 2 + 1, at + 1, by)};
    uint16_t* to = p.out + (strip + half) * p.w.O * 16 + pair_at(o + 2 * row);
    if (p.then == Then::gelu) v = {gelu(v.even), gelu(v.odd)};
    if (p.then == Then::add) {
      const Pair before = load_pair(to);
      v = {_mm512_add_ps(v.even, before.even), _mm512_add_ps(v.odd, before.odd)};
    }
    _mm512_store_si512(to, words_of(v));
    unit++;
  }
};

template <bool bytes>
static inline void multiply(const char* w0, const char* w1, const char* x0, const char* x1) {
  _tile_stream_loadd(4, w0, 64);
  _tile_loadd(6, x0, 64);
  _tile_loadd(7, x1, 64);
  _tile_stream_loadd(5, w1, 64);
  if constexpr (bytes) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  } else {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

static inline void load_sums(const float* c) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + 256, 64);
  _tile_loadd(2, c + 512, 64);
  _tile_loadd(3, c + 768, 64);
}

static inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

static inline void store_sums(float* c) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

constexpr int64_t kPanelBytes = kPanelOutputs / 16 * kPanelSteps * kTileBytes;

static size_t product_scratch(const TowerMatrix& w, int64_t strips) {
  const int64_t kept = w.steps() > kPanelSteps ? strips / 2 : 1;
  return size_t(2 * kPanelBytes + kept * (kPanelOutputs / 32) * 4 * kTileBytes);
}

// A panel's outputs and the part of its inputs that is multiplied at a time.
struct Piece {
  int64_t o, end, part;
};

template <bool bytes>
struct Product {
  const TowerProduct& p;
  int64_t strips;
  char* partial;
  int64_t steps = p.w.steps(), parts = (steps + kPanelSteps - 1) / kPanelSteps;

  int64_t first_step(int64_t part) const { return part * steps / parts; }

  Copy copy(const Piece& piece, char* to) const {
    return {&p.w, piece.o, piece.end, first_step(piece.part), first_step(piece.part + 1) - first_step(piece.part), to};
  }

  // Past all strips; the copy is made meanwhile.
  void run(const Piece& piece, const char* panel, Finisher<bytes>& finish, Copy copy) const {
    const int64_t k = first_step(piece.part), width = first_step(piece.part + 1) - k, tiles = (piece.end - piece.o) / 16;
    const int64_t copies = (copy.tiles() + strips * tiles / 4 - 1) / (strips * tiles / 4);
    const int units = int((31 + width) / width);
    for (int64_t s = 0; s < strips; s += 2)
      for (int64_t at = piece.o; at < piece.end; at += 32) {
        const char *x = p.x + (s * steps + k) * kTileBytes, *w = panel + (at - piece.o) / 16 * width * kTileBytes;
        auto* kept = reinterpret_cast<float*>(partial + (parts > 1 ? s * tiles + (at - piece.o) / 8 : 0) * kTileBytes);
        k ? load_sums(kept) : zero_sums();
        for (int64_t i = 0; i < width; i++) {
          multiply<bytes>(w + i * kTileBytes, w + (width + i) * kTileBytes, x + i * kTileBytes, x + (steps + i) * kTileBytes);
          fetch(x + (2 * steps + i) * kTileBytes, at - piece.o);
          for (int j = 0; j < units && finish.unit < 32; j++) finish.step();
        }
        for (int64_t i = 0; i < copies && !copy.over(); i++) copy.step();
        if (k + width < steps) {
          store_sums(kept);
        } else {
          store_sums(finish.sums[0][0][0]);
          finish.unit = 0, finish.o = at, finish.strip = s;
        }
      }
    copy.all();
  }

  // An eighth of a tile of the next two strips each, which one of the panel's eight pairs of tiles is passed meanwhile.
  void fetch(const char* tile, int64_t at) const {
    for (int64_t half = 0; half < 2; half++, tile += steps * kTileBytes)
      _mm_prefetch(tile + at * 4, _MM_HINT_T1), _mm_prefetch(tile + at * 4 + 64, _MM_HINT_T1);
  }
};

template <bool bytes>
static void product_of(const TowerProduct& p, const Panels& panels, int64_t strips, char* scratch) {
  const Product<bytes> product{p, strips, scratch + 2 * kPanelBytes};
  Piece piece{0, 0, 0};
  if (!panels.take(panels.context, piece.o, piece.end)) return;
  char *panel = scratch, *other = scratch + kPanelBytes;
  product.copy(piece, panel).all();
  for (bool more = true; more;) {
    Finisher<bytes> finish(p, piece.o, piece.end);
    for (int64_t o = piece.o; more && piece.o == o; std::swap(panel, other)) {
      Piece next{piece.o, piece.end, piece.part + 1};
      if (next.part == product.parts) next.part = 0, more = panels.take(panels.context, next.o, next.end);
      product.run(piece, panel, finish, more ? product.copy(next, other) : Copy{});
      piece = next;
    }
    while (finish.unit < 32) finish.step();
  }
}

static void product(const TowerProduct& p, const Panels& panels, int64_t strips, void* scratch) {
  const TileShape shape;
  _tile_loadconfig(&shape);
  p.w.bytes() ? product_of<true>(p, panels, strips, static_cast<char*>(scratch)) : product_of<false>(p, panels, strips, static_cast<char*>(scratch));
  _tile_release();
}

// Pairs (i, i + H / 2) turned: rows 2p, 2p + 1 and their partners.
static void turn(const uint16_t* from, int64_t o, int64_t H, const float* turns, uint16_t* out) {
  for (int64_t i = 0; i < H / 2; i += 2) {
    const Pair a = load_pair(from + pair_at(o + i)), b = load_pair(from + pair_at(o + H / 2 + i));
    const float* t = turns + i * 32;
    const __m512 cos0 = _mm512_loadu_ps(t), sin0 = _mm512_loadu_ps(t + 16), cos1 = _mm512_loadu_ps(t + 32), sin1 = _mm512_loadu_ps(t + 48);
    const auto first = [](__m512 a, __m512 b, __m512 cos, __m512 sin) { return _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)); };
    const auto second = [](__m512 a, __m512 b, __m512 cos, __m512 sin) { return _mm512_fmadd_ps(a, sin, _mm512_mul_ps(b, cos)); };
    _mm512_store_si512(out + pair_at(i), words_of({first(a.even, b.even, cos0, sin0), first(a.odd, b.odd, cos1, sin1)}));
    _mm512_store_si512(out + pair_at(H / 2 + i), words_of({second(a.even, b.even, cos0, sin0), second(a.odd, b.odd, cos1, sin1)}));
  }
}

static void arrange(const uint16_t* columns, const Heads& heads, int64_t head, const float* turns, int64_t strip, uint16_t* part) {
  const int64_t H = heads.H, D = heads.N * H, steps = heads.steps(), size = steps * 512;
  uint16_t *keys = heads.keys(part), *values = heads.values(part);
  for (int64_t half = 0; half < 2; half++) {
    const uint16_t* from = columns + half * 3 * D * 16;
    const float* by = turns + half * H * 16;
    uint16_t *q = part + (strip + half) * size, *k = keys + (strip + half) * size;
    for (uint16_t* out : {q, k})
      for (int64_t i = H; i < steps * 32; i += 2) _mm512_store_si512(out + pair_at(i), _mm512_setzero_si512());
    turn(from, head * H, H, by, q);
    turn(from, D + head * H, H, by, k);
    for (int64_t s = 0; s < steps; s++) {
      __m512i r[16];
      for (int j = 0; j < 16; j++) r[j] = _mm512_load_si512(k + s * 512 + j * 32);
      transpose(r);
      for (int j = 0; j < 16; j++) _mm512_store_si512(k + s * 512 + j * 32, r[j]);
    }
  }
  for (int64_t h = 0; h < H; h += 2) {
    __m256i even[2], odd[2];
    for (int64_t half = 0; half < 2; half++) {
      const __m512i words = _mm512_load_si512(columns + half * 3 * D * 16 + pair_at(2 * D + head * H + h));
      even[half] = _mm512_cvtepi32_epi16(words), odd[half] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16));
    }
    uint16_t* to = values + strip / 2 * H * 32 + h * 32;
    _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(even[0]), even[1], 1));
    _mm512_store_si512(to + 32, _mm512_inserti64x4(_mm512_castsi256_si512(odd[0]), odd[1], 1));
  }
}

}  // namespace tower_amx

namespace tower_attention {
size_t scratch_bytes(int64_t H);
void attend(const Heads& heads, uint16_t* part, int64_t head, int64_t q, int64_t q_end, uint16_t* out, void* scratch);
}  // namespace tower_attention

const TowerKernels& amx_tower() {
  static const TowerKernels kernels{tower_amx::columns, tower_amx::rows,    tower_amx::norm,    tower_amx::quantise, tower_amx::product_scratch,
                                    tower_amx::product, tower_amx::arrange, tower_attention::scratch_bytes,          tower_attention::attend};
  return kernels;
}

}  // namespace ernie
