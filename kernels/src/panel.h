// How a range of output blocks is computed, given one instruction set's inner kernels (`Micro`):
//
//   few_block<bits, T>   16 output rows x T tokens straight from the packed weights, for T <= kFewRows
//   unpack<bits>         one block to bytes [I/4][16][4]; only where `unpacked<bits>` says so
//   tiles                m <= rows_at_once tokens x blocks * 16 outputs from bytes; `next`: the blocks behind these, to be fetched meanwhile
//   offset               what the bytes have too much, after unpacking, for 4 and for 8 bits
//
// Every path sums a group exactly in integers and then does sum = fma(weight_scale * activation_scale, group, sum), groups in order. So a
// row's result depends neither on the instruction set nor on how many rows stand beside it.
#include "rows.h"

namespace ernie {
namespace ERNIE_ISA {

template <class Micro, int bits>
static void few_blocks(const Packed& w, const Quantised& x, int64_t block, float* c) {
  const uint8_t* value = w.value + block * w.block_bytes();
  const uint16_t* scale = w.scale + block * w.G * 16;
  switch (x.T) {
    case 1: return Micro::template few_block<bits, 1>(value, scale, x, c);
    case 2: return Micro::template few_block<bits, 2>(value, scale, x, c);
    case 3: return Micro::template few_block<bits, 3>(value, scale, x, c);
    case 4: return Micro::template few_block<bits, 4>(value, scale, x, c);
    case 5: return Micro::template few_block<bits, 5>(value, scale, x, c);
    case 6: return Micro::template few_block<bits, 6>(value, scale, x, c);
    case 7: return Micro::template few_block<bits, 7>(value, scale, x, c);
    default: return Micro::template few_block<bits, 8>(value, scale, x, c);
  }
}

template <class Micro>
static void few(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out) {
  alignas(64) float c[kFewRows * 16];
  for (; block < end; block++) {
    w.bits == 4 ? few_blocks<Micro, 4>(w, x, block, c) : few_blocks<Micro, 8>(w, x, block, c);
    for (int64_t t = 0; t < x.T; t++) finish_16(out, t, block * 16, c + t * 16);
  }
}

template <class Micro>
static void few_pairs(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out) {
  alignas(64) float gate[kFewRows * 16], up[kFewRows * 16];
  const int64_t half = w.blocks() / 2;
  for (; block < end; block++) {
    w.bits == 4 ? few_blocks<Micro, 4>(w, x, block, gate) : few_blocks<Micro, 8>(w, x, block, gate);
    w.bits == 4 ? few_blocks<Micro, 4>(w, x, block + half, up) : few_blocks<Micro, 8>(w, x, block + half, up);
    for (int64_t t = 0; t < x.T; t++) finish_pair(out, t, block * 16, gate + t * 16, up + t * 16);
  }
}

static inline size_t many_scratch(const Packed& w) { return size_t(kPanelBlocks) * (size_t(w.I) * 16 + size_t(w.G) * 64); }

// Up to four blocks made ready: bytes and float32 scales [blocks][G][16].
template <class Micro>
struct Panel {
  const uint8_t* value[kPanelBlocks];
  float* scale;
  uint8_t* space;

  Panel(const Packed& w, void* scratch) {
    scale = static_cast<float*>(scratch);
    space = static_cast<uint8_t*>(scratch) + kPanelBlocks * w.G * 64;
  }
  void load(const Packed& w, int place, int64_t block) {
    const uint8_t* packed = w.value + block * w.block_bytes();
    uint8_t* to = space + place * w.I * 16;
    value[place] = to;
    if (w.bits == 4) {
      Micro::template unpack<4>(packed, w.I, to);
    } else if constexpr (Micro::unpacks_bytes) {
      Micro::template unpack<8>(packed, w.I, to);
    } else {
      value[place] = packed;
    }
    for (int64_t g = 0; g < w.G; g++) {
      const V d = f32_of_f16(w.scale + (block * w.G + g) * 16);
      std::memcpy(scale + (place * w.G + g) * 16, &d, 64);
    }
  }
};

template <class Micro>
static void many(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, void* scratch) {
  alignas(64) float c[Micro::rows_at_once * kPanelBlocks * 16];
  Micro micro(w, x);
  for (; block < end; block += kPanelBlocks) {
    const int blocks = int(end - block < kPanelBlocks ? end - block : kPanelBlocks);
    Panel<Micro> panel(w, scratch);
    for (int b = 0; b < blocks; b++) panel.load(w, b, block + b);
    for (int64_t t = 0; t < x.T; t += Micro::rows_at_once) {
      const int m = int(x.T - t < Micro::rows_at_once ? x.T - t : Micro::rows_at_once);
      micro.tiles(panel.value, panel.scale, blocks, t, m, c, block + 2 * kPanelBlocks <= end ? w.value + (block + kPanelBlocks) * w.block_bytes() : nullptr);
      for (int i = 0; i < m; i++)
        for (int b = 0; b < blocks; b++) finish_16(out, t + i, (block + b) * 16, c + (i * kPanelBlocks + b) * 16);
    }
  }
}

// As `many`, with two gate blocks and the two up blocks beside them in one panel.
template <class Micro>
static void many_pairs(const Packed& w, const Quantised& x, int64_t block, int64_t end, const Output& out, void* scratch) {
  alignas(64) float c[Micro::rows_at_once * kPanelBlocks * 16];
  Micro micro(w, x);
  const int64_t half = w.blocks() / 2;
  for (; block < end; block += 2) {
    const int pairs = int(end - block < 2 ? 1 : 2);
    Panel<Micro> panel(w, scratch);
    for (int b = 0; b < pairs; b++) {
      panel.load(w, b, block + b);
      panel.load(w, pairs + b, half + block + b);
    }
    for (int64_t t = 0; t < x.T; t += Micro::rows_at_once) {
      const int m = int(x.T - t < Micro::rows_at_once ? x.T - t : Micro::rows_at_once);
      micro.tiles(panel.value, panel.scale, 2 * pairs, t, m, c, nullptr);
      for (int i = 0; i < m; i++)
        for (int b = 0; b < pairs; b++) {
          float* row = c + i * kPanelBlocks * 16;
          finish_pair(out, t + i, (block + b) * 16, row + b * 16, row + (pairs + b) * 16);
        }
    }
  }
}

template <class Micro>
static Kernels table(const char* name, const FloatKernels& floats, const RowKernels& rows) {
  return Kernels{name, quantise, norm_quantise, few<Micro>, few_pairs<Micro>, many_scratch, many<Micro>, many_pairs<Micro>, &floats, &rows, nullptr, nullptr, nullptr};
}

}  // namespace ERNIE_ISA
}  // namespace ernie
