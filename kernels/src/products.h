// Products of two bfloat16 matrices as learning needs them: either factor may lie by rows or by columns, so a gradient is one pass over what the
// forward pass left, and nothing is turned over in memory first. Sums are float32 and run in the same order on any number of threads.
#pragma once
#include "layers.h"

namespace ernie {

// `count` items of K numbers: rows of the left factor, columns of the right one.
struct Factor {
  const uint16_t* data;
  int64_t count, stride;
  bool along;  // the numbers of an item lie side by side and items `stride` apart; else the other way round
};

struct Product {
  Factor left, right;
  int64_t K;
  Type type;
  void* out;       // [left.count, stride]
  int64_t stride;  // elements
  bool add;        // to the float32 numbers that stand there

  // The larger factor is cut into panels, each of which the smaller one passes whole.
  bool left_in_panels() const { return left.count >= right.count; }
  const Factor& panels() const { return left_in_panels() ? left : right; }
  const Factor& passing() const { return left_in_panels() ? right : left; }
};

struct ProductKernels {
  size_t (*packed_size)(const Product& p);                                  // of the passing factor
  void (*pack)(const Product& p, int64_t pair, int64_t end, char* packed);  // its items 32 * pair .. 32 * end
  size_t (*scratch)(const Product& p, int64_t panel);
  void (*panel)(const Product& p, const char* packed, int64_t first, int64_t end, char* scratch);  // items first .. end of the other
};

void product(const ProductKernels& k, const Threads& threads, const Product& p);

}  // namespace ernie
