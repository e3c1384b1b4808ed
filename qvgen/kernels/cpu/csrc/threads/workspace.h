// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace qvgen {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // At least `bytes`, aligned to a page, contents undefined. Throws std::bad_alloc.
  uint8_t* get(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(PAGE, size_t((bytes + PAGE - 1) / PAGE * PAGE)));
      if (!data_) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return data_;
  }

 private:
  static constexpr int64_t PAGE = 4096;
  uint8_t* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace qvgen
