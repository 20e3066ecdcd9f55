#include "step.h"

#include <cstring>

#include "crew.h"
#include "scratch.h"

namespace ernie {
namespace {

constexpr int64_t kAhead = 16384;  // bytes of weights that are fetched while a thread waits
constexpr size_t kMostParts = 16 << 20;  // bytes of attention in parts
constexpr int64_t kRowsWorthSharing = 8;  // fewer: a row costs about a microsecond, waking the others as much

Scratch& memory_of_step() {
  static thread_local Scratch of_thread;
  return of_thread;
}

char* panel_memory(size_t bytes) {
  static thread_local Scratch of_thread;
  return of_thread.take(bytes);
}

char* arranged_memory(size_t bytes) {
  static thread_local Scratch of_thread;
  return of_thread.take(bytes);
}

// One row of quantised activations as a matrix of its own.
Quantised row_of(const Quantised& q, int64_t row) {
  return {q.value + row * q.row_bytes(), q.scale + row * q.G, q.sum + row * q.G, 1, q.I, q.G, q.hadamard, q.floats, q.halves};
}

// Rows first .. first + count of quantised activations.
Quantised rows_of(const Quantised& q, int64_t first, int64_t count) {
  Quantised part = row_of(q, first);
  part.T = count;
  return part;
}

// Room for what one step needs, measured first and handed out second. Under the address sanitiser nobody may touch what lies between.
class Room {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGap = 128;
#else
  static constexpr size_t kGap = 0;
#endif
  void* take(size_t bytes) {
    const size_t at = used_;
    used_ += (bytes + kGap + 127) / 128 * 128;
    if (base_) ASAN_POISON_MEMORY_REGION(base_ + at + bytes, used_ - at - bytes);
    return base_ ? base_ + at : nullptr;
  }
  template <class T>
  T* of(int64_t count) {
    return static_cast<T*>(take(size_t(count) * sizeof(T)));
  }
  void open() { base_ = memory_of_step().take(used_), used_ = 0; }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

// Neighbouring rows of one request that attend together.
struct Chunk {
  int64_t first, rows;
};

class Pass {
 public:
  Pass(const Kernels& k, const Network& n, const Step& s, int64_t threads) : k_(k), n_(n), s_(s), threads_(threads), element_(n.type == Type::f32 ? 4 : 2) {
    if (k.tiled) plan_parts();
    place();
    room_.open();
    place();
    for (int64_t i = 0; i < num_phases_; i++) new (phases_ + i) Phase;
    const int64_t at_once = rows_at_once();
    for (int64_t r = 0; r < s.num_spans; r++)
      for (int64_t t = s.spans[r].first; t < s.spans[r].end; t++) {
        lengths_[t] = s.spans[r].start + t - s.spans[r].first + 1;
        span_of_[t] = r;
        longest_ = lengths_[t] > longest_ ? lengths_[t] : longest_;
        if (at_once && (t - s.spans[r].first) % at_once == 0)
          chunks_[num_chunks_++] = {t, s.spans[r].end - t < at_once ? s.spans[r].end - t : at_once};
      }
  }

  // What every thread does.
  void go() {
    Member m(phases_, num_phases_, threads_, s_.T < kRowsWorthSharing);
    m.run(s_.T, 1, [&](int64_t t, int64_t end) {
      for (; t < end; t++) embed(t);
    }, ThenRows{s_.T, [&](int64_t t, int64_t end) { norm_quantise(n_.layer(0).attention_norm, t, end, space(n_.layer(0).qkv, s_.T)); }});
    for (int64_t i = 0; i < n_.layers; i++) layer(m, i);
    if (n_.head.O && s_.num_answers) head(m);
  }

 private:
  Rows hidden() const { return {s_.hidden, n_.type, n_.D}; }
  char* row(void* base, int64_t t, int64_t width) const { return static_cast<char*>(base) + size_t(t * width) * element_; }

  int64_t rows_at_once() const { return kTileRows / (n_.N / n_.K); }

  // Whether attention goes by blocks of keys: where chunks and key heads are too few for the threads, and the parts fit.
  void plan_parts() {
    const int64_t at_once = rows_at_once();
    int64_t chunks = 0, longest = 0, most_rows = 0;
    for (int64_t r = 0; at_once && r < s_.num_spans; r++) {
      const int64_t rows = s_.spans[r].end - s_.spans[r].first, length = s_.spans[r].start + rows;
      chunks += (rows + at_once - 1) / at_once;
      most_rows = rows > most_rows ? rows : most_rows;
      longest = length > longest ? length : longest;
    }
    PagedJob job{};
    job.N = n_.N, job.K = n_.K;
    part_bytes_ = k_.tiled->part_bytes(job, most_rows < at_once ? most_rows : at_once);
    blocks_ = (longest + k_.tiled->block - 1) / k_.tiled->block;
    if (chunks * n_.K >= 8 * threads_ || size_t(chunks * n_.K * blocks_) * part_bytes_ > kMostParts) blocks_ = 0;
    num_parts_ = chunks * n_.K * blocks_;
  }

  void place() {
    const int64_t T = s_.T;
    inner_ = 0;
    int64_t pairs = 0, most_experts = 0;
    size_t input_bytes = 0, pair_bytes = 0;
    const int64_t rows = T > s_.num_answers ? T : s_.num_answers;
    const auto see = [&](const Packed& w, int64_t count, size_t& most) {
      const size_t bytes = bytes_of(inputs_of(k_, w, n_.type, count));
      most = bytes > most ? bytes : most;
    };
    for (int64_t i = 0; i < n_.layers; i++) {
      const Layer& l = n_.layer(i);
      for (const Packed* w : {&l.qkv, &l.out, &l.gate_up, &l.down})
        if (w->O) see(*w, rows, input_bytes);
      inner_ = l.gate_up.O / 2 > inner_ ? l.gate_up.O / 2 : inner_;
      if (!l.experts.E) continue;
      see(l.experts.gate_up, T * l.experts.top_k, pair_bytes), see(l.experts.down, T * l.experts.top_k, pair_bytes);
      pairs = T * l.experts.top_k > pairs ? T * l.experts.top_k : pairs;
      most_experts = l.experts.E > most_experts ? l.experts.E : most_experts;
      expert_inner_ = l.experts.gate_up.O / 2 > expert_inner_ ? l.experts.gate_up.O / 2 : expert_inner_;
    }
    if (n_.head.O) see(n_.head, rows, input_bytes);
    num_phases_ = n_.layers * 16 + 12;
    phases_ = room_.of<Phase>(num_phases_);
    lengths_ = room_.of<int64_t>(T), span_of_ = room_.of<int64_t>(T), chunks_ = room_.of<Chunk>(T);
    input_ = room_.take(input_bytes), middle_ = room_.take(input_bytes);
    q_ = room_.take(size_t(T * n_.N * n_.H) * element_), seen_ = room_.take(size_t(T * n_.N * n_.H) * element_);
    between_ = room_.take(size_t(T * inner_) * element_);
    if (by_sketch(n_, s_)) search_ = room_.take(Search::bytes(n_.sketch, s_.num_answers));
    if (num_parts_) parts_ = static_cast<char*>(room_.take(size_t(num_parts_) * part_bytes_));
    if (pairs) {
      normed_ = room_.take(size_t(T * n_.D) * element_), shared_ = room_.take(size_t(T * n_.D) * element_);
      scores_ = room_.of<float>(T * most_experts), pair_weights_ = room_.of<float>(pairs), weights_ = room_.of<float>(pairs);
      ids_ = room_.of<int32_t>(pairs), places_ = room_.of<int32_t>(pairs), tokens_ = room_.of<int32_t>(pairs);
      starts_ = room_.of<int64_t>(most_experts + 1), used_ = room_.of<int64_t>(most_experts), filled_ = room_.of<int64_t>(T);
      pair_input_ = room_.take(pair_bytes), pair_middle_ = room_.take(pair_bytes);
      pair_between_ = room_.take(size_t(pairs * expert_inner_) * element_), pair_out_ = room_.take(size_t(pairs * n_.D) * element_);
    }
  }

  Quantised space_in(void* base, const Packed& w, int64_t rows) const { return placed(inputs_of(k_, w, n_.type, rows), base); }
  Quantised space(const Packed& w, int64_t rows) const { return space_in(input_, w, rows); }

  void embed(int64_t t) {
    if (n_.embedding) {
      std::memcpy(row(s_.hidden, t, n_.D), static_cast<const char*>(n_.embedding) + size_t(s_.tokens[t] * n_.D) * element_, size_t(n_.D) * element_);
    } else {
      k_.rows->embed(n_.packed_embedding, s_.tokens[t], n_.D, n_.type, row(s_.hidden, t, n_.D));
    }
  }

  void norm_quantise(const void* weight, int64_t t, int64_t end, const Quantised& q) {
    k_.norm_quantise(hidden(), end - t, n_.D, weight, n_.type, n_.eps, q, t);
  }

  // What products of `x` and whole weights want to have arranged; each thread does it once for itself.
  const void* arranged(const Packed& w, const Quantised& x) const {
    const size_t bytes = w.whole() ? k_.floats->arranged_bytes(x) : 0;
    if (!bytes) return nullptr;
    void* at = arranged_memory(bytes);
    k_.floats->arrange(x, at);
    return at;
  }

  // Blocks (with pairs: of the gate, and the up blocks beside them) first .. end of a product.
  void multiply(const Packed& w, const Quantised& x, const void* arranged, int64_t first, int64_t end, const Output& out) const {
    const bool pairs = out.finish == Finish::swiglu;
    if (w.whole()) return k_.floats->whole(w, x, arranged, first, end, out, panel_memory(k_.floats->whole_scratch(w)));
    if (x.floats) return k_.floats->packed(w, x, first, end, out, panel_memory(size_t(kFloatRows * w.I) * sizeof(float)));
    if (x.T <= kFewRows) return (pairs ? k_.few_pairs : k_.few)(w, x, first, end, out);
    (pairs ? k_.many_pairs : k_.many)(w, x, first, end, out, panel_memory(k_.many_scratch(w)));
  }

  // A product as items of a phase: blocks.
  struct Product {
    const Pass& pass;
    const Packed& w;
    const Quantised& x;
    const Output& out;
    bool pairs;
    mutable const void* arranged = nullptr;
    mutable bool begun = false;
    void operator()(int64_t first, int64_t end) const {
      if (!begun) arranged = pass.arranged(w, x), begun = true;
      pass.multiply(w, x, arranged, first, end, out);
    }
    void ahead(int64_t first, int64_t end) const {
      fetch(w, first, end);
      if (pairs) fetch(w, first + w.blocks() / 2, end + w.blocks() / 2);
    }
    static void fetch(const Packed& w, int64_t first, int64_t end) {
      const uint8_t* from = w.value + first * w.block_bytes();
      const int64_t bytes = (end - first) * w.block_bytes();
      for (int64_t at = 0; at < bytes && at < kAhead; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  };

  // Blocks a thread takes at a time: whole panels where rows are many, at least 32 KiB of weights, and some twenty pieces for each thread.
  int64_t piece(const Packed& w, int64_t blocks, int64_t rows, bool pairs) const {
    const int64_t block_bytes = w.block_bytes() * (pairs ? 2 : 1), panel = pairs ? kPanelBlocks / 2 : kPanelBlocks;
    int64_t at_once = blocks / (threads_ * 16), least = (32768 + block_bytes - 1) / block_bytes;
    at_once = at_once < least ? least : at_once;
    if (w.whole() && rows <= kStreamedRows) return pairs ? at_once : (at_once + 1) / 2 * 2;  // blocks stream by twos
    return rows <= kFewRows ? at_once : (at_once + panel - 1) / panel * panel;
  }

  // The whole product as a phase of its own.
  template <class... Steps>
  void product(Member& m, const Packed& w, const Quantised& x, const Output& out, const Steps&... steps) {
    const bool pairs = out.finish == Finish::swiglu;
    const int64_t blocks = pairs ? w.blocks() / 2 : w.blocks();
    m.run(blocks, piece(w, blocks, x.T, pairs), Product{*this, w, x, out, pairs}, steps...);
  }

  void layer(Member& m, int64_t i) {
    const Layer& l = n_.layer(i);
    const int64_t T = s_.T;
    attention(m, l, i);
    const Quantised seen = space_in(middle_, l.out, T);
    Output to{};
    to.finish = Finish::add, to.type = n_.type, to.out = s_.hidden, to.stride = to.width = n_.D, to.addend = s_.hidden;
    if (l.experts.E) return experts(m, l, i, seen, to);
    product(m, l.out, seen, to, ThenRows{T, [&](int64_t t, int64_t end) { norm_quantise(l.norm, t, end, space(l.gate_up, T)); }});
    const Quantised between = space_in(middle_, l.down, T);
    product(m, l.gate_up, space(l.gate_up, T), swiglu_to(between_, inner_of(l)), ThenRows{T, [&](int64_t t, int64_t end) {
      k_.quantise({between_, n_.type, inner_of(l)}, end - t, inner_of(l), between, t);
    }});
    product(m, l.down, between, to, ThenRows{T, [&](int64_t t, int64_t end) { before_next(i, t, end); }});
  }

  static int64_t inner_of(const Layer& l) { return l.gate_up.O / 2; }

  Output swiglu_to(void* out, int64_t width) const {
    Output to{};
    to.finish = Finish::swiglu, to.type = n_.type, to.out = out, to.stride = to.width = width;
    return to;
  }

  // The next layer's norm; behind the last layer the head takes its own rows.
  void before_next(int64_t i, int64_t t, int64_t end) {
    if (i + 1 < n_.layers) norm_quantise(n_.layer(i + 1).attention_norm, t, end, space(n_.layer(i + 1).qkv, s_.T));
  }

  void attention(Member& m, const Layer& l, int64_t i) {
    const int64_t T = s_.T, width = n_.N * n_.H, kv_width = n_.K * n_.H;
    char* keys = s_.cache + size_t(2 * i * s_.num_slots * kv_width) * element_;
    char* values = keys + size_t(s_.num_slots * kv_width) * element_;
    Output to{};
    to.finish = Finish::rotate, to.type = n_.type, to.width = l.qkv.O, to.out = q_, to.k = keys, to.v = values;
    to.turns = s_.turns, to.pairs = n_.H / 2, to.rotated = (n_.N + n_.K) * n_.H, to.q_width = width, to.kv_width = kv_width, to.slots = s_.slots;
    product(m, l.qkv, space(l.qkv, T), to);
    PagedJob job{};
    job.q = q_, job.keys = keys, job.values = values, job.out = seen_, job.type = job.cache_type = n_.type;
    job.pages = s_.pages, job.lengths = lengths_, job.max_pages = s_.max_pages, job.page_size = s_.page_size;
    job.N = n_.N, job.K = n_.K, job.H = n_.H, job.table = span_of_;
    const Quantised seen = space_in(middle_, l.out, T);
    const ThenRows then{T, [&](int64_t t, int64_t end) { k_.quantise({seen_, n_.type, width}, end - t, width, seen, t); }};
    if (k_.tiled && k_.tiled->takes(job)) {
      if (blocks_) return attend_in_parts(m, job, then);
      m.run(num_chunks_ * n_.K, 1, [&](int64_t item, int64_t) {
        const Chunk& c = chunks_[num_chunks_ - 1 - item / n_.K];  // the last rows of a prompt see the most keys: they come first
        k_.tiled->attend(job, c.first, c.rows, item % n_.K, panel_memory(k_.tiled->scratch()));
      }, then);
    } else {
      const size_t bytes = size_t(n_.N / n_.K) * size_t(longest_ + 16 + 2 * n_.H) * 4;
      m.run(T * n_.K, T < kRowsWorthSharing ? 1 : n_.K, [&](int64_t first, int64_t end) {
        for (; first < end; first++) k_.floats->paged(job, first / n_.K, first % n_.K, reinterpret_cast<float*>(panel_memory(bytes)));
      }, then);
    }
  }

  // Few chunks alone would keep few threads busy: their blocks of keys are computed apart. A chunk and key head has `blocks_` places.
  template <class Then>
  void attend_in_parts(Member& m, const PagedJob& job, const Then& then) {
    struct Blocks {
      const Pass& pass;
      const PagedJob& job;
      void each(int64_t item, bool fetch) const {
        const TiledAttention& tiled = *pass.k_.tiled;
        const int64_t number = item % pass.blocks_, head = item / pass.blocks_ % job.K;
        const Chunk& c = pass.chunks_[item / pass.blocks_ / job.K];
        const int64_t length = job.lengths[c.first + c.rows - 1];
        if (number * tiled.block >= length) return;
        if (fetch) return tiled.fetch(job, c.first, head, number, length);
        tiled.attend_block(job, c.first, c.rows, head, number, pass.parts_ + size_t(item) * pass.part_bytes_, panel_memory(tiled.scratch()));
      }
      void operator()(int64_t item, int64_t end) const {
        for (; item < end; item++) {
          if (item + 1 < end) each(item + 1, true);
          each(item, false);
        }
      }
      void ahead(int64_t item, int64_t) const { each(item, true); }
    };
    m.run(num_chunks_ * n_.K * blocks_, 1, Blocks{*this, job}, ThenRows{num_chunks_ * n_.K, [&](int64_t item, int64_t end) {
      for (; item < end; item++) {
        const Chunk& c = chunks_[item / n_.K];
        k_.tiled->join_blocks(job, c.first, c.rows, item % n_.K, parts_ + size_t(item * blocks_) * part_bytes_, part_bytes_,
                               panel_memory(k_.tiled->scratch()));
      }
    }}, then);
  }

  // Router, routed experts grouped by expert, shared experts beside them, and the sum of it all.
  void experts(Member& m, const Layer& l, int64_t i, const Quantised& seen, const Output& add) {
    const Experts& e = l.experts;
    const int64_t T = s_.T, pairs = T * e.top_k, width = e.gate_up.O / 2;
    const bool shared = l.gate_up.O > 0;
    product(m, l.out, seen, add, ThenRows{T, [&](int64_t t, int64_t end) {
      for (; t < end; t++) {
        k_.rows->norm(hidden(), t, n_.D, l.norm, n_.eps, row(normed_, t, n_.D));
        if (shared) k_.quantise({normed_, n_.type, n_.D}, 1, n_.D, space(l.gate_up, T), t);
      }
    }});
    const Quantised input = space_in(pair_input_, e.gate_up, pairs), middle = space_in(pair_middle_, e.down, pairs);
    m.run(e.E, 4, [&](int64_t first, int64_t end) { k_.rows->scores({normed_, n_.type, n_.D}, T, n_.D, e.router, first, end, scores_, e.E); },
          ThenRows{T, [&](int64_t t, int64_t end) {
            for (; t < end; t++)
              k_.rows->choose(scores_ + t * e.E, e.bias, e.E, e.top_k, e.norm_min, ids_ + t * e.top_k, weights_ + t * e.top_k);
          }},
          ThenRows{1, [&](int64_t, int64_t) { sort(e); }}, ThenRows{pairs, [&](int64_t p, int64_t end) {
            for (; p < end; p++) k_.quantise({row(normed_, tokens_[p], n_.D), n_.type, n_.D}, 1, n_.D, row_of(input, p), 0);
          }});
    const Quantised between = space_in(middle_, l.down, T);
    both(m, l, true, space(l.gate_up, T), input, swiglu_to(between_, inner_of(l)), swiglu_to(pair_between_, width),
         ThenRows{shared ? T : 0, [&](int64_t t, int64_t end) {
           if (end > t) k_.quantise({between_, n_.type, inner_of(l)}, end - t, inner_of(l), between, t);
         }},
         ThenRows{pairs, [&](int64_t p, int64_t end) { k_.quantise({pair_between_, n_.type, width}, end - p, width, middle, p); }});
    Output plain{};
    plain.finish = Finish::store, plain.type = n_.type, plain.stride = plain.width = n_.D;
    Output to_shared = plain, to_pairs = plain;
    to_shared.out = shared_, to_pairs.out = pair_out_;
    both(m, l, false, between, middle, to_shared, to_pairs, ThenRows{T, [&](int64_t t, int64_t end) {
      const int64_t first = t;
      for (; t < end; t++) {
        char* at = row(s_.hidden, t, n_.D);
        k_.rows->mix({at, shared ? row(shared_, t, n_.D) : nullptr, pair_out_, places_ + t * e.top_k, pair_weights_, e.top_k, n_.D, n_.type}, at);
      }
      before_next(i, first, end);
    }});
  }

  // The first (or second) product of the shared experts and of every routed expert that has rows, all in one phase.
  template <class... Steps>
  void both(Member& m, const Layer& l, bool first, const Quantised& x, const Quantised& pairs, const Output& shared_to, const Output& pairs_to,
            const Steps&... steps) {
    m.wait();  // until it is known which experts have rows
    const Packed &shared = first ? l.gate_up : l.down, &stack = first ? l.experts.gate_up : l.experts.down;
    const int64_t shared_blocks = first ? shared.blocks() / 2 : shared.blocks(), blocks = first ? stack.blocks() / 2 : stack.blocks();
    const int64_t rows = s_.T * l.experts.top_k / l.experts.E;  // of one expert, about
    const int64_t shared_piece = shared.O ? piece(shared, shared_blocks, s_.T, first) : 1, step = piece(stack, blocks, rows, first);
    const int64_t shared_units = shared.O ? (shared_blocks + shared_piece - 1) / shared_piece : 0, units = (blocks + step - 1) / step;
    int64_t whose = -2;  // rows were arranged last: an expert's, or -1, the shared experts'
    const void* tiles = nullptr;
    const auto tiles_of = [&](const Packed& w, const Quantised& rows_of_it, int64_t number) {
      if (whose != number) tiles = arranged(w, rows_of_it), whose = number;
      return tiles;
    };
    m.run(shared_units + num_used_ * units, 1, [&](int64_t unit, int64_t) {
      if (unit < shared_units) {
        const int64_t at = unit * shared_piece, end = at + shared_piece < shared_blocks ? at + shared_piece : shared_blocks;
        return multiply(shared, x, tiles_of(shared, x, -1), at, end, shared_to);
      }
      unit -= shared_units;
      const int64_t expert = used_[unit / units], at = unit % units * step, end = at + step < blocks ? at + step : blocks;
      const Packed w = stack.expert(expert);
      const Quantised its = rows_of(pairs, starts_[expert], starts_[expert + 1] - starts_[expert]);
      Output to = pairs_to;
      to.out = row(pairs_to.out, starts_[expert], pairs_to.stride);
      multiply(w, its, tiles_of(w, its, expert), at, end, to);
    }, steps...);
  }

  // Pairs of token and expert in order of experts: where each expert's rows start, whose they are, and each token's places ascending.
  void sort(const Experts& e) {
    const int64_t pairs = s_.T * e.top_k;
    std::memset(starts_, 0, size_t(e.E + 1) * sizeof(int64_t));
    std::memset(filled_, 0, size_t(s_.T) * sizeof(int64_t));
    for (int64_t p = 0; p < pairs; p++) starts_[ids_[p] + 1]++;
    num_used_ = 0;
    for (int64_t x = 0; x < e.E; x++) {
      if (starts_[x + 1]) used_[num_used_++] = x;
      if (e.counts) e.counts[x] += starts_[x + 1];
      starts_[x + 1] += starts_[x];
    }
    for (int64_t p = 0; p < pairs; p++) {
      const int64_t place = starts_[ids_[p]]++;
      tokens_[place] = int32_t(p / e.top_k), pair_weights_[place] = weights_[p];
    }
    for (int64_t x = e.E; x > 0; x--) starts_[x] = starts_[x - 1];
    starts_[0] = 0;
    for (int64_t p = 0; p < pairs; p++) places_[tokens_[p] * e.top_k + filled_[tokens_[p]]++] = int32_t(p);
  }

  void head(Member& m) {
    const int64_t R = s_.num_answers;
    const Quantised x = space(n_.head, R);
    m.run(R, 1, [&](int64_t r, int64_t end) {
      for (; r < end; r++) k_.norm_quantise({row(s_.hidden, s_.answers[r], n_.D), n_.type, n_.D}, 1, n_.D, n_.norm, n_.type, n_.eps, row_of(x, r), 0);
    });
    if (by_sketch(n_, s_)) return search(m, x);
    Output to{};
    to.finish = Finish::logits, to.type = n_.type, to.out = s_.logits, to.stride = to.width = n_.vocabulary;
    product(m, n_.head, x, to);
    m.run(R, 1, [&](int64_t r, int64_t end) {
      for (; r < end; r++) k_.rows->best(s_.logits + r * n_.vocabulary, n_.vocabulary, s_.best + r, s_.best_logit + r);
    });
  }

  // The best tokens of `x` alone.
  void search(Member& m, const Quantised& x) {
    Search search(k_, n_.head, n_.sketch, x, n_.type, search_);
    const Packed& w = n_.sketch.weight;
    const Output to = search.approximate();
    struct Sketched : Product {
      Search& search;
      void operator()(int64_t first, int64_t end) const {
        Product::operator()(first, end);
        search.note(first, end);
      }
    };
    const auto rows = [&](auto&& each) {
      return [each](int64_t r, int64_t end) {
        for (; r < end; r++) each(r);
      };
    };
    m.run(x.T, 1, rows([&](int64_t r) { search.see(r); }));
    m.run(w.blocks(), piece(w, w.blocks(), x.T, false), Sketched{{*this, w, search.seen(), to, false}, search},
          ThenRows{x.T, rows([&](int64_t r) { search.measure(r); })});
    m.run(w.blocks(), 64, [&](int64_t block, int64_t end) { search.look(block, end); },
          ThenRows{x.T, rows([&](int64_t r) { search.best(r, s_.best + r, s_.best_logit + r); })});
  }

  const Kernels& k_;
  const Network& n_;
  const Step& s_;
  const int64_t threads_;
  const size_t element_;
  Room room_;
  Phase* phases_;
  int64_t num_phases_, inner_ = 0, expert_inner_ = 0, longest_ = 0, num_used_ = 0;
  Chunk* chunks_;
  int64_t num_chunks_ = 0, blocks_ = 0, num_parts_ = 0;
  size_t part_bytes_ = 0;
  char* parts_ = nullptr;
  int64_t *lengths_, *span_of_, *starts_, *used_, *filled_;
  int32_t *ids_, *places_, *tokens_;
  float *scores_, *weights_, *pair_weights_;
  void *input_, *middle_, *q_, *seen_, *between_, *normed_, *shared_, *pair_input_, *pair_middle_, *pair_between_, *pair_out_, *search_;
};

}  // namespace

void run_step(const Kernels& k, const Threads& threads, const Network& n, const Step& s) {
  Pass pass(k, n, s, threads.count);
  threads.run(threads.count, [](void* context) { static_cast<Pass*>(context)->go(); }, &pass);
}

}  // namespace ernie
