// What the kernels speak of. No standard containers here: these files are compiled once per instruction set, and a weak symbol that the
// linker picks from the wrong one would run instructions the machine does not have.
//
// Letters: T tokens, O output width, I input width padded to whole groups, G groups along I.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ernie {

enum class Type : int { f32 = 0, bf16 = 1 };

// A row-major matrix of activations in the caller's type; `stride` in elements.
struct Rows {
  const void* data;
  Type type;
  int64_t stride;
};

// Activations as the integer kernels read them: `value` [T, I] in -127 .. 127, `scale` [T, G], and `sum` [T, G], the sum of the group's
// values, from which the unsigned offset of the weights (8 or 128) is taken back. With `floats` nothing is quantised: `value` holds float32
// [T, I], and there are no scales and sums. With `halves` neither: every number is the sum of so many bfloat16 ones, [T, halves, I].
struct Quantised {
  int8_t* value;
  float* scale;
  int32_t* sum;
  int64_t T, I, G;
  bool hadamard;  // rows are turned before they are quantised, see rows.h
  bool floats;
  int halves;
  int64_t row_bytes() const { return halves ? 2 * halves * I : floats ? 4 * I : I; }
};

// Packed weights, see ernie45/quant/pack.py: 16 output rows are interleaved.
//   4 bits: [O/16][I/8][16][4] bytes, low nibble of byte c is input 8j + c, high nibble input 8j + 4 + c; stored + 8
//   8 bits: [O/16][I/4][16][4] bytes, stored + 128
//   scale : [O/16][G][16] float16
// Weights that were not packed stand here too: 16 bits are bfloat16 numbers as they are stored, [O, I] by rows, in one group without a scale.
struct Packed {
  const uint8_t* value;
  const uint16_t* scale;
  int64_t O, I, G;  // O counts the real rows, the last block may be partly empty
  int bits;
  bool hadamard;      // the weights' inputs were turned, so activations are too
  bool float_inputs;  // activations stay float32
  bool whole() const { return bits == 16; }
  int64_t padded() const { return whole() ? (I + 31) / 32 * 32 : I; }  // width of a row of activations
  int64_t blocks() const { return (O + 15) / 16; }
  int64_t group() const { return I / G; }
  int64_t block_bytes() const { return I * 16 * bits / 8; }
  // Of a stack of experts, of which this is the first.
  Packed expert(int64_t number) const {
    Packed w = *this;
    w.value += number * (whole() ? O * I * 2 : blocks() * block_bytes());
    if (!whole()) w.scale += number * blocks() * G * 16;
    return w;
  }
};

// What happens to a tile of float32 results before it is stored.
enum class Finish : int { store, add, swiglu, rotate, logits };

struct Output {
  Finish finish;
  Type type;
  void* out;           // [T, stride]
  int64_t stride;      // elements
  int64_t width;       // columns that exist
  const void* addend;  // Finish::add: [T, stride] of the same type as out
  // Finish::rotate: columns below `rotated` turn by pairs; turn (cos, sin) of pair p of token t at turns[(t * pairs + p) * 2]
  const float* turns;
  int64_t pairs, rotated;
  // Finish::rotate: out is q of width q_width; k and v follow, each of width kv_width, in row slots[t] where slots are given, else t
  void *k, *v;
  int64_t q_width, kv_width;
  const int64_t* slots;
  // Finish::logits: rounded to `type`, stored as float32
};

// Keys and values of one layer, [slots, K, H] each, and the requests of this pass.
struct PagedJob {
  const void *q, *keys, *values;
  void* out;
  Type type, cache_type;
  const int64_t* pages;    // [sequences, max_pages]
  const int64_t* lengths;  // [sequences] keys in sight of the sequence's query
  int64_t max_pages, page_size, N, K, H;
  const int64_t* table;  // row of `pages` of each sequence; null: its own number
};

// Attention of `rows` neighbouring rows of one request, for which rows * (N / K) <= kTileRows, over one key head; job.lengths counts the keys
// that each row sees.
struct TiledAttention {
  bool (*takes)(const PagedJob& job);
  size_t (*scratch)();
  void (*attend)(const PagedJob& job, int64_t first, int64_t rows, int64_t kv_head, void* scratch);
  // The same by blocks of so many keys, each of which fills part_bytes, and then the parts, `stride` bytes apart, put together.
  int64_t block;
  size_t (*part_bytes)(const PagedJob& job, int64_t rows);
  void (*fetch)(const PagedJob& job, int64_t first, int64_t kv_head, int64_t number, int64_t length);  // a block's keys below `length`, to the cache
  void (*attend_block)(const PagedJob& job, int64_t first, int64_t rows, int64_t kv_head, int64_t number, void* parts, void* scratch);
  void (*join_blocks)(const PagedJob& job, int64_t first, int64_t rows, int64_t kv_head, const void* parts, size_t stride,
                      void* scratch);
};
constexpr int64_t kTileRows = 128;

// A row of numbers for the experts of one token, see `RowKernels::mix`.
struct Mixture {
  const void *residual, *shared;  // [D] each; shared may be null
  const void* rows;               // [pairs, D]
  const int32_t* places;          // [count] rows of this token, ascending by expert
  const float* weights;           // [pairs]
  int64_t count, D;
  Type type;
};

// One step of AdamW over one tensor, see ernie45/ops/optimise.py.
struct AdamwJob {
  void *weight, *low;  // float32; or bfloat16, beside what it lacks of float32
  const void* gradient;
  void *mean, *square;
  Type gradient_type, state_type;
  float scale;  // of the gradient
  float mean_share, square_share, square_rest, rate, root_scale, eps, decay;
  uint32_t step;
};

// Row work of a whole step that stands in no product, and the optimiser's.
struct RowKernels {
  void (*embed)(const Packed& w, int64_t token, int64_t width, Type type, void* out);
  void (*norm)(const Rows& x, int64_t t, int64_t width, const void* weight, float eps, void* out);
  // heads of 2 * pairs columns, a multiple of 16, side by side: adjacent pairs turn; turns is [pairs, 2]
  void (*rotate)(const Rows& x, int64_t t, int64_t width, int64_t pairs, const float* turns, void* out);
  void (*swiglu)(const Rows& x, int64_t t, int64_t width, void* out);  // width of the result; the gate stands before the rest
  // out[t * E + e] = x[t] . weight[e] in float32, experts first .. end
  void (*scores)(const Rows& x, int64_t T, int64_t D, const float* weight, int64_t first, int64_t end, float* out, int64_t E);
  // softmax over E scores, the top_k best with their bias: ids best first, weights that sum to one (their sum kept at least norm_min)
  void (*choose)(float* scores, const float* bias, int64_t E, int64_t top_k, float norm_min, int32_t* ids, float* weights);
  void (*mix)(const Mixture& m, void* out);  // out = residual + (sum of weighted rows + shared)
  void (*best)(const float* logits, int64_t n, int64_t* place, float* value);
  void (*adamw)(const AdamwJob& job, int64_t first, int64_t end);
};

// Products with float weights and attention: sums in float32, order and rounding may differ between instruction sets.
struct FloatKernels {
  // Whole weights times activations that stayed floats, as bfloat16 parts where tiles want them so, else as float32: `few` and `many` of
  // Kernels, or their pairs where the finish asks for them. `arrange` fills arranged_bytes for as many products of x as there are; where those
  // are none, it need not be called. A row's sums run in the same order however many rows stand beside it.
  bool halves;
  size_t (*arranged_bytes)(const Quantised& x);
  void (*arrange)(const Quantised& x, void* arranged);
  size_t (*whole_scratch)(const Packed& w);
  void (*whole)(const Packed& w, const Quantised& x, const void* arranged, int64_t block, int64_t end, const Output& out, void* scratch);
  // packed weights times activations that stayed floats: `few` and `many` of Kernels, or their pairs where the finish asks for them;
  // scratch holds kFloatRows * I floats
  void (*packed)(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, void* scratch);
  // one query per sequence against its pages; scratch holds (N / K) * (longest length + 16 + 2 * H) floats
  void (*paged)(const PagedJob& job, int64_t sequence, int64_t kv_head, float* scratch);
};

struct TowerKernels;  // of a vision tower, see tower.h
struct ProductKernels;  // of learning, see products.h

// One instruction set's kernels. Block = 16 output rows, panel = up to four blocks.
struct Kernels {
  const char* name;
  void (*quantise)(const Rows& x, int64_t T, int64_t width, const Quantised& q, int64_t first);
  void (*norm_quantise)(const Rows& x, int64_t T, int64_t width, const void* weight, Type weight_type, float eps, const Quantised& q, int64_t first);
  void (*few)(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out);
  void (*few_pairs)(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out);
  size_t (*many_scratch)(const Packed& w);
  void (*many)(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, void* scratch);
  void (*many_pairs)(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, void* scratch);
  const FloatKernels* floats;
  const RowKernels* rows;
  const TiledAttention* tiled;  // null: there is none
  const TowerKernels* tower;    // the same
  const ProductKernels* products;
};

constexpr int64_t kFewRows = 8;     // up to here weights are streamed once and never unpacked
constexpr int64_t kStreamedRows = 32;  // up to here whole weights meet the tiles as they are stored
constexpr int64_t kPanelBlocks = 4;
constexpr int64_t kFloatRows = 12;  // rows of float activations that meet packed weights at once
constexpr int64_t kTokenPadding = 32;  // rows of `value` that must be readable: T rounded up to this

const Kernels& plain_kernels();
const FloatKernels& plain_floats();
const RowKernels& plain_rows();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
const FloatKernels& avx2_floats();
const FloatKernels& avx512_floats();
const RowKernels& avx2_rows();
const RowKernels& avx512_rows();
const TiledAttention& amx_attention();
const FloatKernels& amx_floats();
const TowerKernels& amx_tower();
const ProductKernels& amx_products();
#elif defined(__aarch64__)
const Kernels& neon_kernels();
const FloatKernels& neon_floats();
const RowKernels& neon_rows();
#endif

}  // namespace ernie
