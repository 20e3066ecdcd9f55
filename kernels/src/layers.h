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

// How `w` wants T rows of activations; `placed` says where they lie. Behind the last row there is memory, see kTokenPadding.
inline Quantised inputs_of(const Kernels& k, const Packed& w, Type type, int64_t T) {
  const bool halves = w.whole() && k.floats->halves;
  return {nullptr, nullptr, nullptr, T, w.padded(), w.G, w.hadamard, w.float_inputs || w.whole(), halves ? type == Type::f32 ? 3 : 1 : 0};
}
inline size_t value_bytes(const Quantised& q) { return (size_t((q.T + kTokenPadding) * q.row_bytes()) + 63) / 64 * 64; }
inline size_t bytes_of(const Quantised& q) { return value_bytes(q) + size_t(q.T * q.G) * 8; }
inline Quantised placed(Quantised q, void* at) {
  char* scales = static_cast<char*>(at) + value_bytes(q);
  q.value = static_cast<int8_t*>(at), q.scale = reinterpret_cast<float*>(scales), q.sum = reinterpret_cast<int32_t*>(scales + q.T * q.G * 4);
  return q;
}

// out [T, O] = x @ w, after the norm if there is one, and after quantising where the weights are packed
void linear(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t width, const Norm& norm, const Packed& w, const Output& out);

// out [T, O] = x @ w for whole weights and any number of rows
void whole_linear(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, const Packed& w, const Output& out);

// out [T, D] = x + swiglu(norm(x) @ gate_up) @ down; without a norm, nothing is added. Needs a gate whose width is a multiple of 16.
void feed_forward(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t D, const Norm& norm, const Packed& gate_up,
                  const Packed& down, void* out);

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
