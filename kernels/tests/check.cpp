// Runs every kernel this machine has over odd shapes, without torch, so that the sanitisers can watch: each must give the plain kernels' bits
// (integers) or come close (floats). Buffers are exactly as large as promised.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "../src/cpu.h"
#include "../src/layers.h"

namespace {

std::mt19937 random_bits(1);

void run(int64_t count, void (*body)(void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; i++) threads.emplace_back(body, context);
  for (auto& t : threads) t.join();
}

constexpr ernie::Threads two{2, run};

struct Matrix {
  std::vector<uint8_t> value;
  std::vector<uint16_t> scale;
  ernie::Packed packed;

  Matrix(int64_t O, int64_t I, int64_t group, int bits) {
    const int64_t padded = (I + group - 1) / group * group, blocks = (O + 15) / 16;
    value.resize(size_t(blocks * 16 * padded * bits / 8));
    scale.resize(size_t(blocks * 16 * (padded / group)));
    for (auto& v : value) v = uint8_t(random_bits());
    for (auto& s : scale) s = uint16_t(0x2000 + random_bits() % 2048);  // about 0.008 .. 0.03
    packed = {value.data(), scale.data(), O, padded, padded / group, bits};
  }
};

std::vector<float> numbers(size_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (auto& v : x) v = normal(random_bits);
  return x;
}

int failures = 0;

void expect_same(const char* what, const char* isa, const std::vector<float>& got, const std::vector<float>& want, float tolerance) {
  for (size_t i = 0; i < got.size(); i++) {
    const bool same = tolerance == 0 ? std::memcmp(&got[i], &want[i], 4) == 0 : std::fabs(got[i] - want[i]) <= tolerance * (1 + std::fabs(want[i]));
    if (!same) {
      std::printf("%s, %s: element %zu is %.9g, not %.9g\n", what, isa, i, double(got[i]), double(want[i]));
      failures++;
      return;
    }
  }
}

std::vector<float> product(const ernie::Kernels& k, const Matrix& m, const std::vector<float>& x, int64_t T, int64_t I) {
  std::vector<float> out(size_t(T * m.packed.O));
  ernie::Output to{};
  to.out = out.data(), to.stride = to.width = m.packed.O;
  ernie::linear(k, two, {x.data(), ernie::Type::f32, I}, T, I, {nullptr, ernie::Type::f32, 0}, m.packed, to);
  return out;
}

std::vector<float> forward(const ernie::Kernels& k, const Matrix& gate_up, const Matrix& down, const std::vector<float>& x, int64_t T, int64_t D) {
  std::vector<float> out(size_t(T * D)), gain(size_t(D), 1.0f);
  ernie::feed_forward(k, two, {x.data(), ernie::Type::f32, D}, T, D, {gain.data(), ernie::Type::f32, 1e-5f}, gate_up.packed, down.packed, out.data());
  return out;
}

std::vector<float> attention(const ernie::Kernels& k, const std::vector<float>& q, const std::vector<float>& keys, int64_t N, int64_t K, int64_t H,
                             const std::vector<int64_t>& pages, const std::vector<int64_t>& lengths, int64_t page_size) {
  std::vector<float> out(q.size());
  const auto sequences = int64_t(lengths.size());
  ernie::PagedJob job{q.data(), keys.data(), keys.data(), out.data(), ernie::Type::f32, ernie::Type::f32, pages.data(), lengths.data(),
                      int64_t(pages.size()) / sequences, page_size, N, K, H};
  ernie::paged(k, two, job, sequences);
  return out;
}

void check(const ernie::Kernels& k) {
  const ernie::Kernels& plain = *ernie::choose("plain");
  for (int bits : {4, 8})
    for (int64_t group : {32, 64, 128, 192})
      for (int64_t T : {1, 2, 3, 5, 8, 9, 17, 33, 40})
        for (int64_t O : {1, 16, 50, 130}) {
          const int64_t I = group == 192 ? 190 : 300;
          const Matrix m(O, I, group, bits);
          auto x = numbers(size_t(T * I));
          if (T == 3) x[5] = NAN, x[size_t(I) + 7] = INFINITY;
          const auto got = product(k, m, x, T, I), want = product(plain, m, x, T, I);
          if (T == 3 && !(std::isnan(got[0]) && std::isnan(got[size_t(O)]) && std::isfinite(got[2 * size_t(O)]))) failures++, std::puts("NaN is lost");
          if (T != 3) expect_same("product", k.name, got, want, 0);
        }
  for (int64_t T : {1, 8, 21}) {
    const Matrix gate_up(2 * 48, 70, 32, 4), down(70, 48, 32, 8);
    const auto x = numbers(size_t(T * 70));
    expect_same("feed-forward", k.name, forward(k, gate_up, down, x, T, 70), forward(plain, gate_up, down, x, T, 70), 1e-5f);
  }
  for (int64_t H : {16, 48, 128}) {
    const int64_t K = 2, N = 10, page_size = 4;
    const auto q = numbers(size_t(3 * N * H)), keys = numbers(size_t(40 * K * H));
    const std::vector<int64_t> pages{9, 0, 3, 1, 2, 4, 5, 6, 7, 8, 0, 1}, lengths{1, 16, 13};
    expect_same("attention", k.name, attention(k, q, keys, N, K, H, pages, lengths, page_size),
                attention(plain, q, keys, N, K, H, pages, lengths, page_size), 1e-5f);
  }
  for (const auto& [T, I, O] : std::vector<std::array<int64_t, 3>>{{1, 100, 21}, {3, 64, 64}, {8, 100, 33}, {17, 96, 70}, {33, 31, 130}, {1030, 40, 50}}) {
    std::vector<uint16_t> w(size_t(I * O));
    for (auto& v : w) v = uint16_t(0x3c00 + random_bits() % 512);
    const auto x = numbers(size_t(T * I));
    std::vector<float> got(size_t(T * O)), want(got);
    ernie::Output to{};
    to.out = got.data(), to.stride = to.width = O;
    ernie::bf16_linear(k, two, {x.data(), ernie::Type::f32, I}, T, w.data(), I, O, to);
    to.out = want.data();
    ernie::bf16_linear(plain, two, {x.data(), ernie::Type::f32, I}, T, w.data(), I, O, to);
    expect_same("bfloat16 product", k.name, got, want, 1e-5f);
  }
}

}  // namespace

int main() {
  std::istringstream names(ernie::available());
  for (std::string name; std::getline(names, name, ',');) check(*ernie::choose(name)), std::printf("%s checked\n", name.c_str());
  std::puts(failures ? "FAILED" : "all agree");
  return failures ? 1 : 0;
}
