// One kernel, once: what `count.py` runs under valgrind, which counts the instructions of ernie::linear, ernie::paged and ernie::rms_norm.
// Usage: count ISA CASE; without arguments it lists the cases.
#include <cstdio>
#include <cstring>
#include <vector>

#include "../src/cpu.h"
#include "../src/layers.h"

namespace {

constexpr ernie::Threads alone{1, [](int64_t, void (*body)(void*), void* context) { body(context); }};

struct Case {
  const char* name;
  int bits;
  int64_t T, I, O, group;
};
constexpr Case cases[] = {
    {"w4a8-1-row", 4, 1, 512, 512, 64},  {"w4a8-8-rows", 4, 8, 512, 512, 64}, {"w4a8-64-rows", 4, 64, 512, 512, 64},
    {"w8a8-1-row", 8, 1, 512, 512, 512}, {"w8a8-64-rows", 8, 64, 512, 512, 512},
    {"bf16-1-row", 16, 1, 512, 512, 512}, {"bf16-8-rows", 16, 8, 512, 512, 512}, {"bf16-64-rows", 16, 64, 512, 512, 512},
};

void product(const ernie::Kernels& k, const Case& c) {
  std::vector<uint8_t> value(size_t(c.O * c.I * c.bits / 8), 0x5a);
  std::vector<uint16_t> scale(size_t(c.O * c.I / c.group), 0x2000);
  std::vector<float> x(size_t(c.T * c.I), 0.5f), out(size_t(c.T * c.O));
  ernie::Output to{};
  to.out = out.data(), to.stride = to.width = c.O;
  ernie::linear(k, alone, {x.data(), ernie::Type::f32, c.I}, c.T, c.I, {nullptr, ernie::Type::f32, 0},
                {value.data(), scale.data(), c.O, c.I, c.I / c.group, c.bits, false, false}, to);
}

void attention(const ernie::Kernels& k) {
  constexpr int64_t N = 16, K = 2, H = 128, page_size = 16, page_count = 16;
  std::vector<float> q(size_t(N * H), 0.1f), out(q.size()), keys(size_t(page_count * page_size * K * H), 0.2f);
  std::vector<int64_t> pages, lengths{page_count * page_size};
  for (int64_t p = 0; p < page_count; p++) pages.push_back(p);
  ernie::PagedJob job{};
  job.q = q.data(), job.keys = job.values = keys.data(), job.out = out.data(), job.pages = pages.data(), job.lengths = lengths.data();
  job.max_pages = page_count, job.page_size = page_size, job.N = N, job.K = K, job.H = H;
  ernie::paged(k, alone, job, 1);
}

void norm(const ernie::Kernels& k) {
  const std::vector<float> x(64 * 1024, 0.3f), gain(1024, 1.0f);
  std::vector<float> out(x.size());
  ernie::rms_norm(k, alone, {x.data(), ernie::Type::f32, 1024}, 64, 1024, {gain.data(), ernie::Type::f32, 1e-5f}, out.data());
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    for (const Case& c : cases) std::puts(c.name);
    std::puts("attention\nnorm");
    return 0;
  }
  const ernie::Kernels* k = ernie::choose(words[1]);
  if (!k) return 2;
  if (!std::strcmp(words[2], "attention")) return attention(*k), 0;
  if (!std::strcmp(words[2], "norm")) return norm(*k), 0;
  for (const Case& c : cases)
    if (!std::strcmp(words[2], c.name)) return product(*k, c), 0;
  return 3;
}
