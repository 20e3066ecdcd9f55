// Memory of one thread that grows to what its largest pass needed and is then used again. Under the address sanitiser, what was not asked
// for this time may not be touched.
#pragma once
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) (void(address), void(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) (void(address), void(bytes))
#endif

#include <cstddef>
#include <cstdlib>
#include <new>

namespace ernie {

class Scratch {
 public:
  ~Scratch() { std::free(base_); }
  char* take(size_t asked) {
    const size_t bytes = (asked + 4095) / 4096 * 4096;
    ASAN_UNPOISON_MEMORY_REGION(base_, size_);
    if (bytes > size_) {
      std::free(base_);
      base_ = std::aligned_alloc(4096, bytes);
      size_ = base_ ? bytes : 0;
      if (!base_) throw std::bad_alloc();
    }
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(base_) + asked, size_ - asked);
    return static_cast<char*>(base_);
  }

 private:
  void* base_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ernie
