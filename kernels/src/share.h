// Work shared between threads, and each thread's memory for it.
#pragma once
#include <atomic>
#include <cstdint>

#include "layers.h"

namespace ernie {

// f(begin, end) over 0 .. items in pieces that threads take as they come: a thread that was held up leaves the rest to the others.
template <class F>
void share(const Threads& threads, int64_t items, int64_t piece, F&& f) {
  if (threads.count <= 1 || items <= piece) return f(0, items);
  struct Work {
    std::atomic<int64_t> next{0};
    int64_t items, piece;
    F* f;
  } work{{0}, items, piece, &f};
  threads.run(
      threads.count,
      [](void* context) {
        Work& w = *static_cast<Work*>(context);
        for (int64_t at; (at = w.next.fetch_add(w.piece, std::memory_order_relaxed)) < w.items;)
          (*w.f)(at, at + w.piece < w.items ? at + w.piece : w.items);
      },
      &work);
}

}  // namespace ernie
