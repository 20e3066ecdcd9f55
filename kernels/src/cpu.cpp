#include "cpu.h"

#include <vector>

#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ernie {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

// Tiles, and what every processor with tiles has beside them but a hypervisor may hide. Tiles must be asked for once per process: the kernel
// then keeps 8 KiB more of every thread's registers.
bool has_amx() {
#if defined(__linux__)
  if (!has_avx512() || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("amx-tile") ||
      !__builtin_cpu_supports("amx-int8") || !__builtin_cpu_supports("amx-bf16"))
    return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long dot_product = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & dot_product;
#else
  return true;  // every Apple processor of this architecture that runs macOS has it
#endif
}
#endif

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (has_amx()) found.push_back(&amx_kernels());
  if (has_avx512()) found.push_back(&avx512_kernels());
  if (has_avx_vnni()) found.push_back(&avx_vnni_kernels());
  if (has_avx2()) found.push_back(&avx2_kernels());
#elif defined(__aarch64__)
  if (has_dot_product()) found.push_back(&neon_kernels());
#endif
  found.push_back(&plain_kernels());
  return found;
}

const std::vector<const Kernels*>& kernels_here() {
  static const std::vector<const Kernels*> found = runnable();
  return found;
}

}  // namespace

const Kernels* choose(const std::string& name) {
  for (const Kernels* k : kernels_here())
    if (name.empty() || name == k->name) return k;
  return nullptr;
}

std::string available() {
  std::string names;
  for (const Kernels* k : kernels_here()) names += (names.empty() ? "" : ",") + std::string(k->name);
  return names;
}

}  // namespace ernie
