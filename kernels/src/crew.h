// Work in phases, done by as many threads as came. A phase is a number of items; threads take them as they come, and the next phase starts
// when all items are done: nobody counts threads, so one that comes late or is held up between two items holds up nobody.
// Waiting threads spin for a moment, a step has hundreds of phases, and then let others have the core.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ernie {

struct alignas(128) Phase {
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> over{false};
};

// Work on `count` rows that follows a phase: each(first, end).
template <class F>
struct ThenRows {
  int64_t count;
  F each;
};
template <class F>
ThenRows(int64_t, F) -> ThenRows<F>;

// One thread's way through the phases; every thread must name the same ones in the same order.
class Member {
 public:
  // few: what follows a phase is done by the thread that ended it, since waking the others costs more
  Member(Phase* phases, int64_t capacity, bool few) : phase_(phases), end_(phases + capacity), few_(few) {}

  // f(first, end) over 0 .. items in pieces, then the rows' work, in order
  template <class F, class... Steps>
  void run(int64_t items, int64_t piece, F&& f, const Steps&... steps) {
    if (few_) {
      once(items, piece, f, [&] { (steps.each(0, steps.count), ...); });
    } else {
      once(items, piece, f, [] {});
      (once(steps.count, steps.count > 256 ? 16 : steps.count > 32 ? 4 : 1, steps.each, [] {}), ...);
    }
  }

 private:
  template <class F, class L>
  void once(int64_t items, int64_t piece, F& f, L&& last) {
    Phase& p = *phase_++;
    if (phase_ > end_) __builtin_trap();
    int64_t mine = 0;
    for (int64_t at; (at = p.next.fetch_add(piece, std::memory_order_relaxed)) < items;) {
      const int64_t end = at + piece < items ? at + piece : items;
      f(at, end);
      mine += end - at;
    }
    if (mine && p.done.fetch_add(mine, std::memory_order_acq_rel) + mine == items) {
      last();
      p.over.store(true, std::memory_order_release);
      return;
    }
    for (int spins = 0; items && !p.over.load(std::memory_order_acquire); spins++) spins < 4000 ? rest() : void(sched_yield());
  }

  static void rest() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  Phase *phase_, *end_;
  bool few_;
};

}  // namespace ernie
