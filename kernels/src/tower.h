// One block of a vision tower in two calls: queries, keys and values of some patches, and all that follows from them.
//
// Inside, 16 patches ("a strip") stand side by side as the right operand of a tile, columns: [inputs / 32][16 pairs of inputs][16 patches][2]
// bfloat16, or [inputs / 64][16 quads of inputs][16 patches][4] bytes. Weights are the left operand as they are stored, so a product's result
// has outputs as rows and patches as columns: what the next product needs is two rows put together, and norms, rotation and softmax work on 16
// patches at once. Nothing is turned over between the rows that come in and those that go out, except keys, once.
#pragma once
#include <cstddef>
#include <vector>

#include "layers.h"

namespace ernie {

constexpr int64_t kStrip = 16;       // patches of one tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kFramePadding = 32;   // patches of a frame are filled up to a multiple of this
constexpr int64_t kPanelOutputs = 256;  // that one thread computes at a time

// [O, I] in bfloat16 by rows, or packed whole numbers with a scale per output; the bias may be null.
struct TowerMatrix {
  const uint16_t* whole;
  Packed packed;  // where whole is null
  const uint16_t* bias;
  int64_t O, I;
  bool bytes() const { return whole == nullptr; }
  int64_t steps() const { return I * (bytes() ? 1 : 2) / 64; }  // tiles along the inputs
};

struct TowerNorm {
  const uint16_t *weight, *bias;
  float eps;
};

// Patches of G frames of `size` patches: all of them, or of one frame those from `first` on, `count` of each frame.
struct Patches {
  int64_t frames, size, first, count;
  int64_t strips_of_frame() const { return (count + kFramePadding - 1) / kFramePadding * 2; }
  int64_t strips() const { return frames * strips_of_frame(); }
};

// Queries, keys and values of whole frames as attention reads them, [frames][heads][part]: queries as columns and keys as rows, [strips][steps]
// tiles each, and values with patches as inputs, [pairs of strips][H / 16] tiles. Heads are filled up to 32 inputs.
struct Heads {
  uint16_t* data;
  int64_t N, H, size;
  int64_t steps() const { return (H + 31) / 32; }
  int64_t strips() const { return (size + kFramePadding - 1) / kFramePadding * 2; }
  int64_t part() const { return strips() * (2 * steps() * 512 + H * 16); }
  uint16_t* of(int64_t frame, int64_t head) const { return data + (frame * N + head) * part(); }
  uint16_t* keys(uint16_t* part) const { return part + strips() * steps() * 512; }
  uint16_t* values(uint16_t* part) const { return part + 2 * strips() * steps() * 512; }
};

// What a product's results go through.
enum class Then : int { store, gelu, add };

// Into columns of O outputs.
struct TowerProduct {
  TowerMatrix w;
  const char* x;         // [strips][steps] tiles
  const float* x_scale;  // [strips][16], where x is bytes
  uint16_t* out;         // [strips][O / 32] tiles; Then::add: what is added to
  Then then;
};

// Outputs that threads take as they come, at most kPanelOutputs and a multiple of 32 at a time; false when there are none left.
struct Panels {
  bool (*take)(void* context, int64_t& o, int64_t& end);
  void* context;
};

struct TowerKernels {
  // rows of bfloat16 -> columns of `strip`; rows beyond the frame's end count as zeros. And back.
  void (*columns)(const uint16_t* rows, int64_t stride, int64_t D, const Patches& p, int64_t strip, uint16_t* out);
  void (*rows)(const uint16_t* columns, int64_t D, const Patches& p, int64_t strip, uint16_t* rows, int64_t stride);
  // norm by mean and variance of one strip's columns; gain is [2][D] floats: weight, bias
  void (*norm)(const uint16_t* columns, int64_t D, const float* gain, float eps, uint16_t* out);
  void (*quantise)(const uint16_t* columns, int64_t D, char* out, float* scale);
  size_t (*product_scratch)(const TowerMatrix& w, int64_t strips);
  // of an even number of strips
  void (*product)(const TowerProduct& p, const Panels& panels, int64_t strips, void* scratch);
  // columns of q | k | v of two neighbouring strips, one head of them, turned and put where attention wants them; turns is [2 strips][H / 2][2][16]
  void (*arrange)(const uint16_t* columns, const Heads& heads, int64_t head, const float* turns, int64_t strip, uint16_t* part);
  size_t (*attend_scratch)(int64_t H);
  // queries of strips q .. q_end of one frame and head over all its keys, into columns of N * H
  void (*attend)(const Heads& heads, uint16_t* part, int64_t head, int64_t q, int64_t q_end, uint16_t* out, void* scratch);
};

struct TowerQkv {
  TowerNorm norm;
  TowerMatrix qkv;
  const float* turns;  // [count, H / 2, 2]
};

struct TowerRest {
  TowerMatrix out;
  TowerNorm norm;
  TowerMatrix up, down;
};

// heads: of the frames that `p` is about
void tower_heads(const TowerKernels& k, const Threads& threads, const TowerQkv& w, const Patches& p, const uint16_t* x, const Heads& heads);

// out [frames * count, D] = h + down(quick_gelu(up(norm(h)))) where h = x + out(attention)
void tower_rest(const TowerKernels& k, const Threads& threads, const TowerRest& w, const Patches& p, const uint16_t* x, const Heads& heads, uint16_t* out);

}  // namespace ernie
