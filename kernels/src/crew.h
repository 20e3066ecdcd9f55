// Work in phases, done by as many threads as came. A phase is a number of items; threads take them as they come, and the next phase starts
// when all items are done: nobody counts threads, so one that comes late or is held up between two items holds up nobody.
// A thread takes its first items of a phase before the one before is over, and fetches their weights while it waits.
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
  Member(Phase* phases, int64_t capacity, int64_t threads, bool few) : phase_(phases), end_(phases + capacity), threads_(threads), few_(few) {}

  // f(first, end) over 0 .. items in pieces, then the rows' work, in order. With f.ahead(first, end), which fetches what f will read, items
  // are taken in long runs that get shorter towards the end.
  template <class F, class... Steps>
  void run(int64_t items, int64_t piece, const F& f, const Steps&... steps) {
    if (few_) {
      once(items, piece, f, [&] { (steps.each(0, steps.count), ...); });
    } else {
      once(items, piece, f, [] {});
      (once(steps.count, steps.count > 256 ? 16 : steps.count > 32 ? 4 : 1, steps.each, [] {}), ...);
    }
  }

  // Until the phases so far are over: for a phase whose number of items they find out.
  void wait() {
    for (int spins = 0; before_ && !before_->over.load(std::memory_order_acquire); spins++) spins < 4000 ? rest() : void(sched_yield());
    before_ = nullptr;
  }

 private:
  template <class F, class L>
  void once(int64_t items, int64_t piece, const F& f, L&& last) {
    if (!items) return;
    constexpr bool fetched = requires { f.ahead(items, items); };
    Phase& p = *phase_++;
    if (phase_ > end_) __builtin_trap();
    int64_t end, mine = 0, at = take<fetched>(p, items, piece, end);
    if constexpr (fetched) {
      if (at < items) f.ahead(at, end);
    }
    for (wait(); at < items; at = take<fetched>(p, items, piece, end)) {
      f(at, end);
      mine += end - at;
    }
    before_ = &p;
    if (mine && p.done.fetch_add(mine, std::memory_order_acq_rel) + mine == items) {
      last();
      p.over.store(true, std::memory_order_release);
    }
  }

  // The first item of those that are now the caller's, up to `end`.
  template <bool runs>
  int64_t take(Phase& p, int64_t items, int64_t piece, int64_t& end) const {
    int64_t at = p.next.load(std::memory_order_relaxed);
    do {
      if (at >= items) return items;
      const int64_t run = runs ? (items - at) / (2 * threads_) / piece * piece : 0, count = run > piece ? run : piece;
      end = at + count < items ? at + count : items;
    } while (!p.next.compare_exchange_weak(at, end, std::memory_order_relaxed));
    return at;
  }

  static void rest() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  Phase *phase_, *end_;
  const Phase* before_ = nullptr;  // the last one that this thread has not seen over
  int64_t threads_;
  bool few_;
};

}  // namespace ernie
