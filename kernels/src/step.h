// A whole step of a decoder: tokens in, the next tokens' logits out, keys and values written to the cache on the way. Matrices
// are packed or whole.
#pragma once
#include "sketch.h"

namespace ernie {

// Routed experts: matrices of expert 0, the others follow at the same distance. `E` is 0 where a layer has none; `counts`, [E] or null, is
// told how often each was chosen.
struct Experts {
  int64_t E, top_k;
  float norm_min;
  const float *router, *bias;  // [E, D] and [E]
  Packed gate_up, down;
  int64_t* counts = nullptr;
};

// `gate_up` and `down` are the dense feed-forward, or the shared experts beside the routed ones; their `O` is 0 where a layer has none.
struct Layer {
  const void *attention_norm, *norm;
  Packed qkv, out, gate_up, down;
  Experts experts;
};

// Lives in memory of torch's: plain data, its layers behind it.
struct Network {
  uint64_t magic;
  Type type;  // of activations, norms and cache
  int64_t D, N, K, H, vocabulary, layers;
  float eps;
  const void* norm;
  const void* embedding;  // [vocabulary, D] of `type`, or null: `packed_embedding`
  Packed packed_embedding, head;  // a head whose O is 0 is computed by the caller
  Sketch sketch;                  // of the head, or none

  Layer& layer(int64_t i) { return reinterpret_cast<Layer*>(this + 1)[i]; }
  const Layer& layer(int64_t i) const { return reinterpret_cast<const Layer*>(this + 1)[i]; }
};

constexpr uint64_t kNetworkMagic = 0x316e6b7377746e72;

// One request's rows `first` .. `end`, at positions `start` and on.
struct Span {
  int64_t first, end, start;
};

struct Step {
  int64_t T;
  const int64_t* tokens;
  const float* turns;    // [T, H / 2, 2] cosine and sine
  const int64_t* slots;  // [T] where keys and values go
  char* cache;           // [layers, 2, slots, K, H]
  int64_t num_slots, page_size;
  const Span* spans;
  int64_t num_spans;
  const int64_t* pages;  // [spans, max_pages]
  int64_t max_pages;
  void* hidden;  // [T, D], before the final norm
  // rows whose next token is wanted: logits [answers, vocabulary], rounded to `type`, the best of each row and its logit (NaN if any is)
  const int64_t* answers;
  int64_t num_answers;
  bool only_best;  // the logits are not wanted: they may be null where `by_sketch`
  float* logits;
  int64_t* best;
  float* best_logit;
};

// Whether the step finds the best tokens by the head's sketch, and computes no other logits.
inline bool by_sketch(const Network& n, const Step& s) { return s.only_best && n.sketch.weight.O && s.num_answers <= kFewRows; }

void run_step(const Kernels& k, const Threads& threads, const Network& n, const Step& s);

}  // namespace ernie
