#include "tower.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"
#include "share.h"

namespace ernie {
namespace {

constexpr int64_t kMostStrips = 64;  // that pass through all of a block at once: what lies between its products stays in the caches

enum Purpose { columns, normed, between, bytes, scales, gains, pass, purposes };

Scratch& scratch(Purpose purpose) {
  static thread_local Scratch of_thread[purposes];
  return of_thread[purpose];
}

uint16_t* space(Purpose purpose, int64_t strips, int64_t width) {
  return reinterpret_cast<uint16_t*>(scratch(purpose).take(size_t(strips * width * kStrip) * 2));
}

float widened(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

const float* gain_of(const TowerNorm& norm, int64_t D) {
  auto* gain = reinterpret_cast<float*>(scratch(gains).take(size_t(2 * D) * 4));
  for (int64_t i = 0; i < D; i++) gain[i] = widened(norm.weight[i]), gain[D + i] = widened(norm.bias[i]);
  return gain;
}

struct Bytes {
  char* data;
  float* scale;
};

Bytes room_for_bytes(int64_t strips, int64_t width) {
  return {scratch(bytes).take(size_t(strips * width * kStrip)), reinterpret_cast<float*>(scratch(scales).take(size_t(strips * kStrip) * 4))};
}

struct Tower {
  const TowerKernels& k;
  const Threads& threads;

  // The product of strips 0 .. count of x, which are quantised where the weight is.
  void product(const TowerMatrix& w, const uint16_t* x, int64_t count, uint16_t* out, Then then) const {
    TowerProduct p{w, reinterpret_cast<const char*>(x), nullptr, out, then};
    if (w.bytes()) {
      const Bytes b = room_for_bytes(count, w.I);
      share(threads, count, 1, [&](int64_t s, int64_t end) {
        for (; s < end; s++) k.quantise(x + s * w.I * kStrip, w.I, b.data + s * w.I * kStrip, b.scale + s * kStrip);
      });
      p.x = b.data, p.x_scale = b.scale;
    }
    // as many panels for every thread: 32 outputs more or less
    struct Taken {
      std::atomic<int64_t> next{0};
      int64_t tiles, count;
    } taken{{0}, w.O / 32, 0};
    taken.count = std::min(taken.tiles, ((w.O + kPanelOutputs - 1) / kPanelOutputs + threads.count - 1) / threads.count * threads.count);
    const auto take = [](void* context, int64_t& o, int64_t& end) {
      Taken& t = *static_cast<Taken*>(context);
      const int64_t i = t.next.fetch_add(1, std::memory_order_relaxed);
      o = i * t.tiles / t.count * 32, end = (i + 1) * t.tiles / t.count * 32;
      return i < t.count;
    };
    share(threads, threads.count, 1, [&](int64_t, int64_t) { k.product(p, {take, &taken}, count, scratch(pass).take(k.product_scratch(w, count))); });
  }

  void norm(const TowerNorm& n, const uint16_t* x, int64_t D, int64_t count, uint16_t* out) const {
    const float* gain = gain_of(n, D);
    share(threads, count, 1, [&](int64_t s, int64_t end) {
      for (; s < end; s++) k.norm(x + s * D * kStrip, D, gain, n.eps, out + s * D * kStrip);
    });
  }

  // f(strip, end) over all strips, some at a time
  template <class F>
  static void in_parts(int64_t strips, F&& f) {
    const int64_t parts = (strips + kMostStrips - 1) / kMostStrips;
    for (int64_t i = 0; i < parts; i++) f(i * (strips / 2) / parts * 2, (i + 1) * (strips / 2) / parts * 2);
  }
};

// [strips of one frame][H / 2][cos, sin][16]; zeros behind the last patch
std::vector<float> turns_by_strip(const float* turns, const Patches& p, int64_t H) {
  std::vector<float> out(size_t(p.strips_of_frame() * H * kStrip));
  for (int64_t t = 0; t < p.count; t++)
    for (int64_t i = 0; i < H; i++) out[size_t((t / kStrip * H + i) * kStrip + t % kStrip)] = turns[t * H + i];
  return out;
}

}  // namespace

void tower_heads(const TowerKernels& k, const Threads& threads, const TowerQkv& w, const Patches& p, const uint16_t* x, const Heads& heads) {
  const Tower tower{k, threads};
  const int64_t D = heads.N * heads.H;
  const std::vector<float> turns = turns_by_strip(w.turns, p, heads.H);
  Tower::in_parts(p.strips(), [&](int64_t first, int64_t end) {
    const int64_t count = end - first;
    uint16_t *cols = space(columns, count, D), *ready = space(normed, count, D), *qkv = space(between, count, 3 * D);
    share(threads, count, 1, [&](int64_t s, int64_t last) {
      for (; s < last; s++) k.columns(x, D, D, p, first + s, cols + s * D * kStrip);
    });
    tower.norm(w.norm, cols, D, count, ready);
    tower.product(w.qkv, ready, count, qkv, Then::store);
    share(threads, count / 2, 1, [&](int64_t pair, int64_t last) {
      for (; pair < last; pair++) {
        const int64_t strip = first + 2 * pair, frame = strip / p.strips_of_frame(), here = strip % p.strips_of_frame();
        for (int64_t n = 0; n < heads.N; n++)
          k.arrange(qkv + 2 * pair * 3 * D * kStrip, heads, n, turns.data() + here * heads.H * kStrip, p.first / kStrip + here, heads.of(frame, n));
      }
    });
  });
}

void tower_rest(const TowerKernels& k, const Threads& threads, const TowerRest& w, const Patches& p, const uint16_t* x, const Heads& heads, uint16_t* out) {
  const Tower tower{k, threads};
  const int64_t D = heads.N * heads.H, F = w.up.O, per_frame = p.strips_of_frame();
  Tower::in_parts(p.strips(), [&](int64_t first, int64_t end) {
    const int64_t count = end - first;
    uint16_t *h = space(columns, count, D), *ready = space(normed, count, D), *inner = space(between, count, F);
    // a head of one frame a time, the keys of which then stay near
    struct Span {
      int64_t frame, strip, end;
    };
    std::vector<Span> spans;
    for (int64_t s = first; s < end;) {
      const int64_t last = std::min(end, (s / per_frame + 1) * per_frame);
      spans.push_back({s / per_frame, s, last});
      s = last;
    }
    share(threads, int64_t(spans.size()) * heads.N, 1, [&](int64_t item, int64_t last) {
      for (; item < last; item++) {
        const Span& span = spans[size_t(item / heads.N)];
        const int64_t n = item % heads.N, q = p.first / kStrip + span.strip - span.frame * per_frame;
        k.attend(heads, heads.of(span.frame, n), n, q, q + span.end - span.strip, ready + (span.strip - first) * D * kStrip,
                 scratch(pass).take(k.attend_scratch(heads.H)));
      }
    });
    share(threads, count, 1, [&](int64_t s, int64_t last) {
      for (; s < last; s++) k.columns(x, D, D, p, first + s, h + s * D * kStrip);
    });
    tower.product(w.out, ready, count, h, Then::add);
    tower.norm(w.norm, h, D, count, ready);
    tower.product(w.up, ready, count, inner, Then::gelu);
    tower.product(w.down, inner, count, h, Then::add);
    share(threads, count, 1, [&](int64_t s, int64_t last) {
      for (; s < last; s++) k.rows(h + s * D * kStrip, D, p, first + s, out, D);
    });
  });
}

}  // namespace ernie
