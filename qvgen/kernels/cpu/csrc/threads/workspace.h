// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

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
      const int64_t page = bytes < WORTH_A_HUGE_PAGE ? PAGE : HUGE_PAGE, size = (bytes + page - 1) / page * page;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(page, size_t(size)));
      if (!data_) throw std::bad_alloc();
#ifdef __linux__
      if (page == HUGE_PAGE) madvise(data_, size_t(size), MADV_HUGEPAGE);
#endif
      capacity_ = bytes;
    }
    return data_;
  }

 private:
  static constexpr int64_t PAGE = 4096, HUGE_PAGE = 2 << 20, WORTH_A_HUGE_PAGE = 64 << 10;
  uint8_t* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace qvgen
