// Memory of one thread that grows to what its largest pass needed and is then used again.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace ernie {

class Scratch {
 public:
  ~Scratch() { std::free(base_); }
  char* take(size_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    if (bytes > size_) {
      std::free(base_);
      base_ = std::aligned_alloc(4096, bytes);
      size_ = base_ ? bytes : 0;
      if (!base_) throw std::bad_alloc();
    }
    return static_cast<char*>(base_);
  }

 private:
  void* base_ = nullptr;
  size_t size_ = 0;
};

}  // namespace ernie
