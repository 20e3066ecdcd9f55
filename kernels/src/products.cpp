#include "products.h"

#include <algorithm>

#include "scratch.h"
#include "share.h"

namespace ernie {
namespace {

constexpr int64_t kMostItems = 256, kFewestItems = 64;  // of a panel

// Panels as large as the second cache likes them, but several for each thread.
int64_t panel_items(const Product& p, int64_t threads) {
  int64_t items = kMostItems;
  while (items > kFewestItems && p.panels().count < 3 * threads * items) items /= 2;
  return items;
}

}  // namespace

void product(const ProductKernels& k, const Threads& threads, const Product& p) {
  static thread_local Scratch packed_memory;
  char* packed = packed_memory.take(k.packed_size(p));
  share(threads, (p.passing().count + 31) / 32, 1, [&](int64_t pair, int64_t end) { k.pack(p, pair, end, packed); });
  const int64_t items = panel_items(p, threads.count), count = p.panels().count;
  share(threads, (count + items - 1) / items, 1, [&](int64_t panel, int64_t end) {
    static thread_local Scratch memory;
    for (; panel < end; panel++) k.panel(p, packed, panel * items, std::min((panel + 1) * items, count), memory.take(k.scratch(p, items)));
  });
}

}  // namespace ernie
