// Runs every kernel this machine has over odd shapes, without torch, so that the sanitisers can watch: each must give the plain kernels' bits
// (integers) or come close (floats). Buffers are exactly as large as promised.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "../src/cpu.h"
#include "../src/layers.h"
#include "../src/products.h"
#include "../src/step.h"
#include "../src/tower.h"

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

  // 16 bits: whole, and exactly as large; the group is then all of it
  Matrix(int64_t O, int64_t I, int64_t group, int bits) {
    if (bits == 16) {
      value.resize(size_t(2 * O * I));
      for (size_t i = 0; i < value.size(); i += 2) {
        const auto number = uint16_t((random_bits() & 0x8000) | (0x3d00 + random_bits() % 256));  // 0.03 .. 0.12 and below zero
        std::memcpy(&value[i], &number, 2);
      }
      packed = {value.data(), nullptr, O, I, 1, bits, false, false};
      return;
    }
    const int64_t padded = (I + group - 1) / group * group, blocks = (O + 15) / 16;
    value.resize(size_t(blocks * 16 * padded * bits / 8));
    scale.resize(size_t(blocks * 16 * (padded / group)));
    for (auto& v : value) v = uint8_t(random_bits());
    for (auto& s : scale) s = uint16_t(0x2000 + random_bits() % 2048);  // about 0.008 .. 0.03
    packed = {value.data(), scale.data(), O, padded, padded / group, bits, false, false};
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
                      int64_t(pages.size()) / sequences, page_size, N, K, H, nullptr};
  ernie::paged(k, two, job, sequences);
  return out;
}

struct StepCase {
  int64_t T, H, page_size;
  int threads;
  bool bf16, packed_embedding, shared, hadamard;
  bool whole = false;
};

// Two layers, one dense and one of experts, over pages: a prompt of T - 1 rows whose first `past` keys are there already, and a single row.
// Returns logits, then hidden states.
std::vector<float> step(const ernie::Kernels& k, const StepCase& c) {
  random_bits.seed(7);
  const int64_t D = 80, N = 6, K = 2, H = c.H, F = 96, E = 5, V = 50, T = c.T, past = 3;
  const int64_t max_pages = (T + past) / c.page_size + 1, slots = (max_pages + 1) * c.page_size;
  const int bits = c.whole ? 16 : 4;
  Matrix embedding(V, D, 32, bits), head(V, D, 32, c.whole ? 16 : 8), qkv((N + 2 * K) * H, D, 32, bits), out(D, N * H, 32, c.whole ? 16 : 8), gate_up(2 * F, D, 32, bits);
  Matrix down(D, F, 32, bits), expert_up(2 * F * E, D, 32, bits), expert_down(D * E, F, 32, bits);
  expert_up.packed.O = 2 * F, expert_down.packed.O = D;
  for (Matrix* m : {&embedding, &head, &qkv, &out, &gate_up, &down, &expert_up, &expert_down}) m->packed.hadamard = c.hadamard;
  const size_t element = c.bf16 ? 2 : 4;
  const std::vector<float> norm_f32(D, 1.0f), router = numbers(E * D), bias(E, 0.01f);
  const std::vector<uint16_t> norm_bf16(D, 0x3f80);
  const std::vector<char> whole_embedding(size_t(V * D) * element, 0x3c);  // 0.0115 either way
  const void* norm = c.bf16 ? static_cast<const void*>(norm_bf16.data()) : norm_f32.data();
  std::vector<char> memory(sizeof(ernie::Network) + 2 * sizeof(ernie::Layer));
  auto& n = *reinterpret_cast<ernie::Network*>(memory.data());
  n.type = c.bf16 ? ernie::Type::bf16 : ernie::Type::f32, n.D = D, n.N = N, n.K = K, n.H = H, n.vocabulary = V, n.layers = 2, n.eps = 1e-5f;
  n.norm = norm, n.packed_embedding = embedding.packed, n.head = head.packed;
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> sketch((ernie::sketch_bytes(n.head) + 63) / 64);
  if (!c.whole && !ernie::draw_sketch({c.threads, run}, n.head, sketch.data(), n.sketch)) failures++, std::puts("the head has no sketch");
  if (!c.packed_embedding) n.embedding = whole_embedding.data();
  for (int64_t i = 0; i < 2; i++) n.layer(i) = {norm, norm, qkv.packed, out.packed, gate_up.packed, down.packed, {}};
  if (!c.shared) n.layer(1).gate_up = n.layer(1).down = {};
  std::vector<int64_t> chosen(E, 1);  // added to
  n.layer(1).experts = {E, 2, 1e-12f, router.data(), bias.data(), expert_up.packed, expert_down.packed, chosen.data()};
  // the prompt's pages lie in falling order, the single row has the last page to itself
  std::vector<int64_t> tokens, places, pages(size_t(2 * max_pages));
  for (int64_t p = 0; p < max_pages; p++) pages[size_t(p)] = max_pages - 1 - p;
  pages[size_t(max_pages)] = max_pages;
  for (int64_t t = 0; t < T; t++) tokens.push_back(t % V);
  for (int64_t at = past; at < past + T - 1; at++) places.push_back(pages[size_t(at / c.page_size)] * c.page_size + at % c.page_size);
  places.push_back(max_pages * c.page_size);
  std::vector<ernie::Span> spans{{0, T - 1, past}, {T - 1, T, 0}};
  if (T == 1) spans.erase(spans.begin()), pages.erase(pages.begin(), pages.begin() + max_pages);
  const std::vector<int64_t> answers{T - 1, 0};
  const std::vector<float> turns(size_t(T * H), 0.7f);
  std::vector<char> cache(size_t(2 * 2 * slots * K * H) * element), hidden(size_t(T * D) * element);
  std::vector<float> result(size_t(2 * V)), best_logit(2);
  std::vector<int64_t> best(2);
  ernie::Step s{T, tokens.data(), turns.data(), places.data(), cache.data(), slots, c.page_size, spans.data(), int64_t(spans.size()), pages.data(),
                max_pages, hidden.data(), answers.data(), 2, false, result.data(), best.data(), best_logit.data()};
  ernie::run_step(k, {c.threads, run}, n, s);
  if (std::accumulate(chosen.begin(), chosen.end(), int64_t{0}) != E + 2 * T) failures++, std::printf("step, %s: not every choice of an expert was counted\n", k.name);
  for (size_t r = 0; r < 2; r++)
    if (result[r * size_t(V) + size_t(best[r])] != best_logit[r]) failures++, std::printf("step, %s: the best logit is not where it is said to be\n", k.name);
  std::vector<float> alone_logit(2), all(result);
  std::vector<int64_t> alone(2);
  s.only_best = true, s.logits = c.whole ? all.data() : nullptr,  // a whole head has no sketch
  s.best = alone.data(), s.best_logit = alone_logit.data();
  ernie::run_step(k, {c.threads, run}, n, s);
  if (alone != best || alone_logit != best_logit) failures++, std::printf("step, %s: the sketch finds another best token\n", k.name);
  return result;
}

void check_steps(const ernie::Kernels& k) {
  const ernie::Kernels& plain = *ernie::choose("plain");
  for (const StepCase& c : std::vector<StepCase>{{1, 32, 16, 1, true, true, true, false},
                                                 {2, 128, 16, 2, true, false, false, true},
                                                 {7, 64, 32, 2, false, true, true, true},
                                                 {9, 48, 16, 3, true, true, false, false},
                                                 {38, 32, 16, 2, true, true, true, false},
                                                 {38, 16, 4, 3, false, false, true, false},
                                                 {150, 64, 16, 2, true, false, true, true},
                                                 {1, 32, 16, 2, true, true, true, false, true},
                                                 {7, 64, 32, 3, false, true, true, false, true},
                                                 {32, 48, 16, 2, true, false, false, false, true},
                                                 {38, 16, 4, 2, false, true, true, false, true},
                                                 {150, 64, 16, 2, true, true, true, false, true}}) {
    const auto got = step(k, c);
    // an activation that falls on the other side of a half moves by a whole step, and so do the layers behind it
    expect_same("step", k.name, got, step(plain, c), c.bf16 ? 0.3f : 0.05f);
    for (int threads : {1, 4}) {  // which thread does what must change nothing
      StepCase other = c;
      other.threads = threads;
      expect_same("step on other threads", k.name, step(k, other), got, 0);
    }
  }
}

// Norm, turned pairs and SwiGLU, one behind the other.
std::vector<float> row_work(const ernie::Kernels& k, const std::vector<float>& x, const std::vector<float>& gain, const std::vector<float>& turns,
                            int64_t T, int64_t D) {
  std::vector<float> normed(x.size()), turned(x.size()), out(x.size() / 2);
  ernie::rms_norm(k, two, {x.data(), ernie::Type::f32, D}, T, D, {gain.data(), ernie::Type::f32, 1e-5f}, normed.data());
  ernie::rotate(k, two, {normed.data(), ernie::Type::f32, D}, T, D, 8, turns.data(), turned.data());
  ernie::swiglu(k, two, {turned.data(), ernie::Type::f32, D}, T, D / 2, out.data());
  return out;
}

// A plain product, norm and attention in float64 would be another library: here only bounds, threads and equal bits on every way are watched.
void check_tower(const ernie::Kernels& k) {
  if (!k.tower) return;
  struct Case {
    int64_t N, H, F, frames, size, step;
    bool packed;
  };
  const auto bf16 = [](size_t n) {
    std::vector<uint16_t> v(n);
    for (auto& x : v) x = uint16_t((random_bits() & 0x8000) | (0x3d00 + random_bits() % 512));
    return v;
  };
  for (const Case& c : std::vector<Case>{{2, 32, 64, 1, 4, 4, false}, {1, 128, 192, 2, 45, 45, false}, {4, 48, 320, 1, 420, 64, true}, {4, 16, 1344, 3, 33, 33, false}}) {
    const int64_t D = c.N * c.H;
    std::vector<std::vector<uint16_t>> whole;
    std::vector<Matrix> packed;
    packed.reserve(4);
    const auto matrix = [&](int64_t O, int64_t I) {
      whole.push_back(bf16(size_t(O)));
      ernie::TowerMatrix m{nullptr, {}, whole.back().data(), O, I};
      if (c.packed) {
        packed.emplace_back(O, I, I, 8);
        m.packed = packed.back().packed;
      } else {
        whole.push_back(bf16(size_t(O * I)));
        m.whole = whole.back().data();
      }
      return m;
    };
    whole.reserve(16);
    const auto gain = bf16(size_t(D)), x = bf16(size_t(c.frames * c.size * D));
    const std::vector<float> turns(size_t(c.size * c.H), 0.7f);
    const ernie::TowerNorm norm{gain.data(), gain.data(), 1e-6f};
    ernie::TowerQkv qkv{norm, matrix(3 * D, D), turns.data()};
    const ernie::TowerRest rest{matrix(D, D), norm, matrix(c.F, D), matrix(D, c.F)};
    std::vector<uint16_t> first;
    for (int threads : {1, 2, 3})
      for (int64_t step : {c.size, c.step}) {
        ernie::Heads heads{nullptr, c.N, c.H, c.size};
        std::vector<uint16_t> space(size_t(c.frames * c.N * heads.part()) + 32), out(size_t(c.frames * c.size * D));
        heads.data = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64);
        for (bool second : {false, true})
          for (int64_t at = 0; at < c.size; at += step) {
            const ernie::Patches p{c.frames, c.size, at, std::min(step, c.size - at)};
            qkv.turns = turns.data() + at * c.H;
            second ? ernie::tower_rest(*k.tower, {threads, run}, rest, p, x.data() + at * D, heads, out.data() + at * D)
                   : ernie::tower_heads(*k.tower, {threads, run}, qkv, p, x.data() + at * D, heads);
          }
        if (first.empty()) first = out;
        if (out != first) failures++, std::printf("tower of %ld heads of %ld: threads or parts change the result\n", long(c.N), long(c.H));
      }
  }
}

void check_layers(const ernie::Kernels& k) {
  const ernie::Kernels& plain = *ernie::choose("plain");
  for (int64_t T : {1, 40}) {
    const int64_t D = 112;
    const auto x = numbers(size_t(T * D)), gain = numbers(size_t(D)), turns = numbers(size_t(T * 16));
    expect_same("rows", k.name, row_work(k, x, gain, turns, T, D), row_work(plain, x, gain, turns, T, D), 1e-5f);
  }
  for (int bits : {4, 8})
    for (int64_t group : {32, 64, 128, 192})
      for (int64_t T : {1, 2, 3, 5, 8, 9, 17, 33, 40})
        for (int64_t O : {1, 16, 50, 130}) {
          const int64_t I = group == 192 ? 190 : 300;
          Matrix m(O, I, group, bits);
          auto x = numbers(size_t(T * I));
          if (T == 3) x[5] = NAN, x[size_t(I) + 7] = INFINITY;
          const auto got = product(k, m, x, T, I), want = product(plain, m, x, T, I);
          if (T == 3 && !(std::isnan(got[0]) && std::isnan(got[size_t(O)]) && std::isfinite(got[2 * size_t(O)]))) failures++, std::puts("NaN is lost");
          if (T != 3) expect_same("product", k.name, got, want, 0);
          m.packed.float_inputs = true;
          if (T != 3) expect_same("product with float activations", k.name, product(k, m, x, T, I), product(plain, m, x, T, I), 1e-4f);
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
  for (const auto& [T, I, O] : std::vector<std::array<int64_t, 3>>{{1, 100, 21}, {3, 64, 64}, {8, 100, 33}, {17, 96, 70}, {33, 31, 130}, {1030, 40, 50}})
    for (bool bf16 : {false, true}) {
      const Matrix w(O, I, I, 16);
      std::vector<uint16_t> halves(size_t(T * I));
      for (auto& v : halves) v = uint16_t(0x3c00 + random_bits() % 512);
      const auto x = numbers(size_t(T * I));
      const ernie::Rows rows{bf16 ? static_cast<const void*>(halves.data()) : x.data(), bf16 ? ernie::Type::bf16 : ernie::Type::f32, I};
      std::vector<float> got(size_t(T * O)), want(got);
      ernie::Output to{};
      to.out = got.data(), to.stride = to.width = O;
      ernie::whole_linear(k, two, rows, T, w.packed, to);
      to.out = want.data();
      ernie::whole_linear(plain, two, rows, T, w.packed, to);
      expect_same("bfloat16 product", k.name, got, want, 1e-5f);
    }
}

// Learning: matrices in every layout, in one piece or part of a larger one; a step of the optimiser over a tensor in two halves and in one.
void check_learning(const ernie::Kernels& k) {
  const ernie::Kernels& plain = *ernie::choose("plain");
  for (const auto& [M, K, N] : std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {33, 40, 50}, {70, 1100, 300}, {300, 31, 65}, {16, 2100, 700}})
    for (int layout = 0; k.products && layout < 4; layout++) {
      const bool left_along = layout & 1, right_along = layout & 2;
      std::vector<uint16_t> left(size_t(M * K)), right(size_t(K * N));
      for (auto& v : left) v = uint16_t(0x3c00 + random_bits() % 512);
      for (auto& v : right) v = uint16_t(0x3c00 + random_bits() % 512);
      std::vector<float> got(size_t(M * N), 1.0f), want(got);
      std::vector<uint16_t> halves(size_t(M * N));
      ernie::Product p{{left.data(), M, left_along ? K : M, left_along}, {right.data(), N, right_along ? K : N, right_along}, K, ernie::Type::f32, got.data(), N, true};
      ernie::product(*k.products, two, p);
      p.type = ernie::Type::bf16, p.out = halves.data(), p.add = false;
      ernie::product(*k.products, two, p);
      const auto number = [](uint16_t h) {
        const uint32_t bits = uint32_t(h) << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
      };
      for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++)
          for (int64_t i = 0; i < K; i++)
            want[size_t(m * N + n)] += number(left[size_t(left_along ? m * K + i : i * M + m)]) * number(right[size_t(right_along ? n * K + i : i * N + n)]);
      expect_same("product for learning", k.name, got, want, 1e-5f);
    }
  for (const bool half : {false, true})
    for (const bool short_state : {false, true}) {
      const int64_t n = 70001;
      std::vector<std::vector<float>> results;
      for (const ernie::Kernels* each : {&plain, &k}) {
        std::vector<float> weight(size_t(n), 1.0f), gradient(size_t(n), 0.5f), mean(size_t(n), 0.25f), square(size_t(n), 2.0f);
        std::vector<uint16_t> high(size_t(n), 0x3f80), low(size_t(n), 0x7fff), means(size_t(n), 0x3e80), squares(size_t(n), 0x4000);
        ernie::AdamwJob job{half ? static_cast<void*>(high.data()) : weight.data(), half ? low.data() : nullptr, gradient.data(),
                            short_state ? static_cast<void*>(means.data()) : mean.data(), short_state ? static_cast<void*>(squares.data()) : square.data(),
                            ernie::Type::f32, short_state ? ernie::Type::bf16 : ernie::Type::f32, 0.5f, 0.1f, 0.05f, 0.95f, 0.01f, 1.5f, 1e-8f, 1e-3f, 3};
        ernie::adamw(*each, two, job, n);
        for (const auto* bits : {&high, &low, &means, &squares}) weight.insert(weight.end(), bits->begin(), bits->end());
        for (const auto* numbers : {&mean, &square}) weight.insert(weight.end(), numbers->begin(), numbers->end());
        results.push_back(weight);
      }
      expect_same("step of the optimiser", k.name, results[1], results[0], 0);
    }
}

}  // namespace

// `check` runs everything, `check step` whole steps alone: the thread sanitiser has work enough with those.
int main(int count, char** words) {
  const bool only_steps = count > 1 && std::strcmp(words[1], "step") == 0;
  std::istringstream names(ernie::available());
  for (std::string name; std::getline(names, name, ',');) {
    const ernie::Kernels& k = *ernie::choose(name);
    if (!only_steps) check_layers(k), check_learning(k);
    check_tower(k);
    check_steps(k);
    std::printf("%s checked\n", name.c_str());
  }
  std::puts(failures ? "FAILED" : "all agree");
  return failures ? 1 : 0;
}
