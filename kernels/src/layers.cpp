#include "layers.h"

#include "scratch.h"
#include "share.h"

namespace ernie {
namespace {

enum Purpose { activations, panels, between, arranged, purposes };
constexpr int64_t kMostRows = 1024;  // that meet whole weights at once: float32 ones take three times their size

Scratch& scratch(Purpose purpose) {
  static thread_local Scratch of_thread[purposes];
  return of_thread[purpose];
}

int64_t pieces(int64_t items, int64_t threads, int64_t multiple) {
  const int64_t piece = items / (threads * 6) / multiple * multiple;
  return piece < multiple ? multiple : piece;
}

void quantise(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t width, const Norm& norm, const Quantised& q) {
  // a row costs about a microsecond; waking the others costs three
  share(threads, T, T < 8 ? T : pieces(T, threads.count, 1), [&](int64_t first, int64_t end) {
    if (norm.weight) {
      k.norm_quantise(x, end - first, width, norm.weight, norm.type, norm.eps, q, first);
    } else {
      k.quantise(x, end - first, width, q, first);
    }
  });
}

void product(const Kernels& k, const Threads& threads, const Quantised& x, const Packed& w, const Output& out) {
  const bool pairs = out.finish == Finish::swiglu;
  const int64_t blocks = pairs ? w.blocks() / 2 : w.blocks();
  if (w.whole()) {
    char* tiles = scratch(arranged).take(k.floats->arranged_bytes(x));
    if (k.floats->arranged_bytes(x)) k.floats->arrange(x, tiles);
    share(threads, blocks, pieces(blocks, threads.count, pairs ? 1 : 2), [&](int64_t first, int64_t end) {
      k.floats->whole(w, x, tiles, first, end, out, scratch(panels).take(k.floats->whole_scratch(w)));
    });
    return;
  }
  if (x.floats) {
    share(threads, blocks, pieces(blocks, threads.count, 1), [&](int64_t first, int64_t end) {
      k.floats->packed(w, x, first, end, out, scratch(panels).take(size_t(kFloatRows * w.I) * sizeof(float)));
    });
    return;
  }
  if (x.T <= kFewRows) {
    share(threads, blocks, pieces(blocks, threads.count, 1),
          [&](int64_t first, int64_t end) { (pairs ? k.few_pairs : k.few)(w, x, first, end, out); });
    return;
  }
  share(threads, blocks, pieces(blocks, threads.count, pairs ? kPanelBlocks / 2 : kPanelBlocks), [&](int64_t first, int64_t end) {
    (pairs ? k.many_pairs : k.many)(w, x, first, end, out, scratch(panels).take(k.many_scratch(w)));
  });
}

}  // namespace

void linear(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t width, const Norm& norm, const Packed& w,
            const Output& out) {
  const Quantised inputs = inputs_of(k, w, x.type, T), q = placed(inputs, scratch(activations).take(bytes_of(inputs)));
  quantise(k, threads, x, T, width, norm, q);
  product(k, threads, q, w, out);
}

void whole_linear(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, const Packed& w, const Output& out) {
  const size_t x_element = x.type == Type::f32 ? 4 : 2, out_element = out.type == Type::f32 ? 4 : 2;
  for (int64_t t = 0; t < T; t += kMostRows) {
    Output to = out;
    to.out = static_cast<char*>(out.out) + size_t(t * out.stride) * out_element;
    const Rows part{static_cast<const char*>(x.data) + size_t(t * x.stride) * x_element, x.type, x.stride};
    linear(k, threads, part, T - t < kMostRows ? T - t : kMostRows, w.I, {nullptr, x.type, 0}, w, to);
  }
}

void feed_forward(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t D, const Norm& norm, const Packed& gate_up,
                  const Packed& down, void* out) {
  const int64_t F = gate_up.O / 2;
  const size_t element = x.type == Type::f32 ? 4 : 2;
  char* h = scratch(between).take(size_t(T * F) * element);
  Output inner{};
  inner.finish = Finish::swiglu;
  inner.type = x.type, inner.out = h, inner.stride = inner.width = F;
  linear(k, threads, x, T, D, norm, gate_up, inner);
  Output outer{};
  outer.finish = norm.weight ? Finish::add : Finish::store;
  outer.type = x.type, outer.out = out, outer.stride = outer.width = D, outer.addend = x.data;
  linear(k, threads, Rows{h, x.type, F}, T, F, Norm{nullptr, x.type, 0}, down, outer);
}

template <class F>
static void each_row(const Threads& threads, Type type, int64_t T, int64_t width, void* out, F&& f) {
  const size_t row = size_t(width) * (type == Type::f32 ? 4 : 2);
  share(threads, T, T < 16 ? T : pieces(T, threads.count, 1), [&](int64_t t, int64_t end) {
    for (; t < end; t++) f(t, static_cast<char*>(out) + size_t(t) * row);
  });
}

void rms_norm(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t D, const Norm& norm, void* out) {
  each_row(threads, x.type, T, D, out, [&](int64_t t, void* to) { k.rows->norm(x, t, D, norm.weight, norm.eps, to); });
}

void rotate(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t width, int64_t pairs, const float* turns, void* out) {
  each_row(threads, x.type, T, width, out, [&](int64_t t, void* to) { k.rows->rotate(x, t, width, pairs, turns + t * pairs * 2, to); });
}

void swiglu(const Kernels& k, const Threads& threads, const Rows& x, int64_t T, int64_t width, void* out) {
  each_row(threads, x.type, T, width, out, [&](int64_t t, void* to) { k.rows->swiglu(x, t, width, to); });
}

void adamw(const Kernels& k, const Threads& threads, const AdamwJob& job, int64_t count) {
  constexpr int64_t block = 1 << 15;
  share(threads, (count + block - 1) / block, 1, [&](int64_t first, int64_t end) { k.rows->adamw(job, first * block, end * block < count ? end * block : count); });
}

void paged(const Kernels& k, const Threads& threads, const PagedJob& job, int64_t sequences) {
  int64_t longest = 0;
  for (int64_t i = 0; i < sequences; i++) longest = job.lengths[i] > longest ? job.lengths[i] : longest;
  const size_t bytes = size_t(job.N / job.K) * size_t(longest + 16 + 2 * job.H) * 4;
  share(threads, sequences * job.K, 1, [&](int64_t first, int64_t end) {
    float* memory = reinterpret_cast<float*>(scratch(panels).take(bytes));
    for (; first < end; first++) k.floats->paged(job, first / job.K, first % job.K, memory);
  });
}

}  // namespace ernie
