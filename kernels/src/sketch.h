// A head's sketch: 4 bits a weight of the 8 that the head has, read in its place to find the rows that may have the largest logit. Only these are
// computed whole, so the best token costs half the bytes and is the same to the bit.
//
// Every input i has a random shift v[i] in [-1, 0), and a weight w of the head is sketched as (code - v[i]) * step, where code is w / step + v[i]
// rounded. So whatever the weights and the activations x are, the errors of a row are independent and uniform in +- step / 2, and such a sum stays
// below kReach * sqrt(sum of (step * x[i])^2) but with probability exp(-6 * kReach^2) (uniform numbers are strictly sub-Gaussian with a variance of
// step^2 / 12). One sum counts, that of the row with the largest logit: less than one token in 10^15 can differ from that of the whole head.
#pragma once
#include <atomic>

#include "layers.h"

namespace ernie {

constexpr float kReach = 2.4f;

struct Sketch {
  Packed weight;         // 4 bits, in the head's groups; O is 0 where there is none
  const float* shift;    // [I] v
  const float* longest;  // [blocks] the largest step of a block of rows
};

// Bytes of memory that `draw_sketch` wants, 0 for a head that has no 8 bits or takes float activations.
size_t sketch_bytes(const Packed& head);

// The sketch of `head` in `memory`, aligned to 64 bytes; false where a scale is no number or too large for its own sketch.
bool draw_sketch(const Threads& threads, const Packed& head, void* memory, Sketch& sketch);

// The best rows of a head for R rows of activations, found in four passes: `see` for each row, the product of the sketch with `seen` into
// `approximate` in any pieces, each followed by `note`, then `measure` for each row, then `look` over all blocks in any pieces.
class Search {
 public:
  static size_t bytes(const Sketch& sketch, int64_t R);
  Search(const Kernels& k, const Packed& head, const Sketch& sketch, const Quantised& x, Type type, void* memory);

  void see(int64_t r);
  const Quantised& seen() const { return seen_; }
  Output approximate() const;
  void note(int64_t block, int64_t end);
  void measure(int64_t r);
  void look(int64_t block, int64_t end);
  void best(int64_t r, int64_t* place, float* logit) const;  // NaN where a logit is no number

 private:
  // The largest value and the first place it has, in one word that grows with it: not a number is the largest of all.
  using Best = std::atomic<uint64_t>;

  float* row(int64_t r) const { return logits_ + r * head_.blocks() * 16; }
  void compute(int64_t r, int64_t block);
  bool may_win(int64_t r, int64_t at) const;

  const Kernels& k_;
  const Packed& head_;
  const Sketch& sketch_;
  const Quantised x_;
  const Type type_;
  Quantised seen_;         // x with sums that hold the shifts too
  float *logits_;          // [R, blocks * 16] by the sketch, whole where they were computed
  float *energy_;          // [R, G] sum of x^2
  float *reach_, *slack_;  // [R] how far the error of a step of 1 reaches at most; how far rounded sums do
  float* least_;           // [R] below this nothing wins
  Best *nearest_, *best_;  // [R]
};

}  // namespace ernie
