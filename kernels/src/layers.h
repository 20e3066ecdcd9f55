// Whole layers: scratch memory, threads, and the order of the kernels. Independent of torch and of the instruction set.
#pragma once
#include "types.h"

namespace ernie {

// Runs body(context) on every thread at once; handed in, so that the caller's thread pool is used and its size respected.
struct Threads {
  int64_t count;
  void (*run)(int64_t count, void (*body)(void* context), void* context);
};

struct Norm {
  const void* weight;  // null: no norm
  Type type;
  float eps;
};

// out [T, O] = quantised(x) @ w
void linear(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t width, const Norm& norm, const Packed& w, const Output& out);

// out [T, D] = x + swiglu(norm(x) @ gate_up) @ down; without a norm, nothing is added. Needs a gate whose width is a multiple of 16.
void feed_forward(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t D, const Norm& norm, const Packed& gate_up,
                  const Packed& down, void* out);

// out [T, O] = x @ w for a bfloat16 weight [O, I]
void bf16_linear(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, const uint16_t* w, int64_t I, int64_t O, const Output& out);

// out [T, D] = the norm of x, whose rows lie in one piece, in the type of x and of the weight
void rms_norm(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t D, const Norm& norm, void* out);

// out [T, width] = x with adjacent pairs turned, in heads of 2 * pairs columns; turns is [T, pairs, 2]
void rotate(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t width, int64_t pairs, const float* turns, void* out);

// out [T, width] = silu(gate) * up of x [T, 2 * width]
void swiglu(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t width, void* out);

// One step over a tensor of so many numbers.
void adamw(const Kernels& k, const Threads& threads, const AdamwJob& job, int64_t count);

// One query per sequence over its pages.
void paged(const Kernels& k, const Threads& threads, const PagedJob& job, int64_t sequences);

}  // namespace ernie
