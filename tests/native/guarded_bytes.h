// Memory that ends against a page nobody may touch, and has another in front of its first page: a
// copy that goes past the end faults.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "check.h"

namespace kvmem {

inline constexpr size_t kPage = 4096;

inline constexpr uint64_t RoundUp(uint64_t value, uint64_t to) {
  return (value + to - 1) / to * to;
}

class GuardedBytes {
 public:
  // All zeros. data() is page-aligned if `size` is a multiple of a page.
  explicit GuardedBytes(size_t size) : size_(size), mapped_(RoundUp(size, kPage) + 2 * kPage) {
    void* const mapped =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mapped != MAP_FAILED);
    base_ = static_cast<std::byte*>(mapped);
    CHECK(mprotect(base_, kPage, PROT_NONE) == 0);
    CHECK(mprotect(base_ + mapped_ - kPage, kPage, PROT_NONE) == 0);
  }
  ~GuardedBytes() { munmap(base_, mapped_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  std::byte* data() const { return base_ + mapped_ - kPage - size_; }
  size_t size() const { return size_; }

 private:
  const size_t size_;
  const size_t mapped_;
  std::byte* base_;
};

}  // namespace kvmem
