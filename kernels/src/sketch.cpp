#include "sketch.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "share.h"

namespace ernie {
namespace {

constexpr float kLevels = 7.5f;                    // weights reach from -kLevels to kLevels steps
constexpr float kLargest = 65504.0f;               // of float16
constexpr float kOff = 4.0f;                       // whole steps that a rounded sum of a group may be off
constexpr float kRoundings = 1.001f, kTie = 1.0f / 256;  // of the sums in float32; of a logit rounded to bfloat16

float f32_of_f16(uint16_t h) {
  const uint32_t bits = uint32_t(h & 0x7fff) << 13;  // as in rows.h: exact, and infinity becomes 65536
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  return (h & 0x8000 ? -0x1p112f : 0x1p112f) * magnitude;
}

// The least float16 that is not below f, for f in 0 .. kLargest.
uint16_t f16_above(float f) {
  if (f < 0x1p-14f) return uint16_t(std::ceil(f * 0x1p24f));
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return uint16_t(((bits + 0x1fff) >> 13) - (112 << 10));
}

// [0, 1) for place i: splitmix64.
float random_at(uint64_t i) {
  uint64_t z = (i + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return float((z ^ (z >> 31)) >> 40) * 0x1p-24f;
}

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// One block of 16 rows; false where a scale has no sketch.
bool draw_block(const Packed& head, int64_t block, const float* shift, uint8_t* codes, uint16_t* steps, float* longest) {
  const int64_t group = head.group();
  const uint8_t* value = head.value + block * head.block_bytes();
  *longest = 0.0f;
  for (int64_t g = 0; g < head.G; g++) {
    float ratio[64];  // of each byte of a quad of inputs
    for (int64_t r = 0; r < 16; r++) {
      const float scale = f32_of_f16(head.scale[(block * head.G + g) * 16 + r]), wanted = std::fabs(scale) * (128 / kLevels);
      if (!(wanted <= kLargest)) return false;
      const float step = f32_of_f16(steps[g * 16 + r] = f16_above(wanted));
      *longest = step > *longest ? step : *longest;
      for (int64_t c = 0; c < 4; c++) ratio[r * 4 + c] = step > 0.0f ? scale / step : 0.0f;
    }
    for (int64_t i = g * group; i < (g + 1) * group; i += 8, value += 128, codes += 64)
      for (int64_t b = 0; b < 64; b++) {
        // rounded: 8.5 more than to nearest, cut; -8.5 .. 7.5 steps are 0 .. 15
        const int low = int(float(int(value[b]) - 128) * ratio[b] + (shift[i + b % 4] + 8.5f));
        const int high = int(float(int(value[64 + b]) - 128) * ratio[b] + (shift[i + 4 + b % 4] + 8.5f));
        codes[b] = uint8_t((low > 15 ? 15 : low) | (high > 15 ? 15 : high) << 4);
      }
  }
  return true;
}

uint64_t word(float value, int64_t place) {
  if (value != value) return ~uint64_t(0);
  value += 0.0f;  // there is one zero
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint64_t(bits ^ (bits >> 31 ? 0xffffffff : 0x80000000)) << 32 | uint32_t(~uint32_t(place));
}

float value_of(uint64_t word) {
  const uint32_t high = uint32_t(word >> 32), bits = high ^ (high >> 31 ? 0x80000000 : 0xffffffff);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;  // the word of what is no number gives one that is none
}

int64_t place_of(uint64_t word) { return word == ~uint64_t(0) ? 0 : int64_t(uint32_t(~uint32_t(word))); }

void raise(std::atomic<uint64_t>& best, uint64_t word) {
  uint64_t before = best.load(std::memory_order_relaxed);
  while (before < word && !best.compare_exchange_weak(before, word, std::memory_order_relaxed)) {
  }
}

}  // namespace

size_t sketch_bytes(const Packed& head) {
  if (head.bits != 8 || head.float_inputs || !head.O) return 0;
  return padded(size_t(head.blocks() * head.I * 8)) + padded(size_t(head.blocks() * head.G * 32)) + padded(size_t(head.I) * 4) + size_t(head.blocks()) * 4;
}

bool draw_sketch(const Threads& threads, const Packed& head, void* memory, Sketch& sketch) {
  const int64_t blocks = head.blocks();
  auto* codes = static_cast<uint8_t*>(memory);
  auto* steps = reinterpret_cast<uint16_t*>(codes + padded(size_t(blocks * head.I * 8)));
  auto* shift = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(steps) + padded(size_t(blocks * head.G * 32)));
  auto* longest = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(shift) + padded(size_t(head.I) * 4));
  for (int64_t i = 0; i < head.I; i++) shift[i] = random_at(uint64_t(i)) - 1.0f;
  std::atomic<bool> sound{true};
  share(threads, blocks, 64, [&](int64_t block, int64_t end) {
    for (; block < end && sound; block++)
      if (!draw_block(head, block, shift, codes + block * head.I * 8, steps + block * head.G * 16, longest + block)) sound = false;
  });
  Packed weight = head;
  weight.value = codes, weight.scale = steps, weight.bits = 4;
  if (sound) sketch = {weight, shift, longest};
  return sound;
}

size_t Search::bytes(const Sketch& sketch, int64_t R) {
  const Packed& w = sketch.weight;
  return size_t(R * w.blocks() * 64) + size_t(R) * 2 * sizeof(Best) + size_t(R * w.G) * 8 + size_t(R) * 12;
}

Search::Search(const Kernels& k, const Packed& head, const Sketch& sketch, const Quantised& x, Type type, void* memory)
    : k_(k), head_(head), sketch_(sketch), x_(x), type_(type), seen_(x) {
  const int64_t R = x.T, groups = R * x.G;
  logits_ = static_cast<float*>(memory);
  nearest_ = reinterpret_cast<Best*>(logits_ + R * head.blocks() * 16), best_ = nearest_ + R;
  energy_ = reinterpret_cast<float*>(best_ + R);
  seen_.sum = reinterpret_cast<int32_t*>(energy_ + groups);
  reach_ = energy_ + 2 * groups, slack_ = reach_ + R, least_ = slack_ + R;
}

void Search::see(int64_t r) {
  const int64_t group = head_.group();
  float all = 0.0f, off = 0.0f;
  for (int64_t g = 0; g < x_.G; g++) {
    const int8_t* value = x_.value + r * x_.I + g * group;
    const float scale = x_.scale[r * x_.G + g];
    float shifted = 0.0f;
    int32_t squares = 0;
    for (int64_t i = 0; i < group; i++) {
      shifted += sketch_.shift[g * group + i] * float(value[i]);
      squares += int32_t(value[i]) * value[i];
    }
    // the kernels take back 8 times the sum, for codes that are 8 too large: here they are 8 + shift
    seen_.sum[r * x_.G + g] = x_.sum[r * x_.G + g] + int32_t(std::lrintf(shifted / 8));
    energy_[r * x_.G + g] = scale * scale * float(squares);
    all += energy_[r * x_.G + g], off += std::fabs(scale);
  }
  reach_[r] = kReach * kRoundings * std::sqrt(all), slack_[r] = kOff * kRoundings * off;
  new (nearest_ + r) Best(0);
  new (best_ + r) Best(0);
}

Output Search::approximate() const {
  Output to{};
  to.finish = Finish::store, to.type = Type::f32, to.out = logits_, to.stride = head_.blocks() * 16, to.width = head_.O;
  return to;
}

void Search::note(int64_t block, int64_t end) {
  const int64_t first = block * 16, count = (end * 16 < head_.O ? end * 16 : head_.O) - first;
  for (int64_t r = 0; r < x_.T; r++) {
    int64_t place;
    float value;
    k_.rows->best(row(r) + first, count, &place, &value);
    raise(nearest_[r], word(value, first + place));
  }
}

// The whole logits of a block take the place of the sketched ones.
void Search::compute(int64_t r, int64_t block) {
  const Quantised one{x_.value + r * x_.I, x_.scale + r * x_.G, x_.sum + r * x_.G, 1, x_.I, x_.G, x_.hadamard, false, 0};
  Output to = approximate();
  to.finish = Finish::logits, to.type = type_, to.out = row(r);
  k_.few(head_, one, block, block + 1, to);
  for (int64_t at = block * 16; at < block * 16 + 16 && at < head_.O; at++) raise(best_[r], word(row(r)[at], at));
}

void Search::measure(int64_t r) {
  compute(r, place_of(nearest_[r]) / 16);
  const float found = value_of(best_[r]);
  least_[r] = found - std::fabs(found) * kTie;
}

bool Search::may_win(int64_t r, int64_t at) const {
  const int64_t block = at / 16;
  float sum = 0.0f;
  for (int64_t g = 0; g < x_.G; g++) {
    const float step = f32_of_f16(sketch_.weight.scale[(block * x_.G + g) * 16 + at % 16]);
    sum += step * step * energy_[r * x_.G + g];
  }
  return !(row(r)[at] + kReach * kRoundings * std::sqrt(sum) + sketch_.longest[block] * slack_[r] < least_[r]);
}

void Search::look(int64_t block, int64_t end) {
  for (int64_t r = 0; r < x_.T; r++) {
    if (least_[r] != least_[r]) continue;  // the answer is not a number, and known
    for (int64_t b = block; b < end; b++) {
      const float bar = least_[r] - sketch_.longest[b] * (reach_[r] + slack_[r]), *logits = row(r) + b * 16;
      const int64_t count = head_.O - b * 16 < 16 ? head_.O - b * 16 : 16;
      int near = 0;
      for (int64_t j = 0; j < count; j++) near += !(logits[j] < bar);
      for (int64_t j = 0; near && j < count; j++)
        if (may_win(r, b * 16 + j)) {
          compute(r, b);
          break;
        }
    }
  }
}

void Search::best(int64_t r, int64_t* place, float* logit) const { *place = place_of(best_[r]), *logit = value_of(best_[r]); }

}  // namespace ernie
