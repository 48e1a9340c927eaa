// Which units of data.kvd are taken: a bitmap, from which runs are taken lowest first after the one
// before, so that a file that is not full yet grows by its end.
//
// Thread safety: none; DiskStore's lock guards it.
#pragma once

#include <cstdint>
#include <vector>

namespace kvmem {

class DiskSpace {
 public:
  static constexpr uint64_t kNone = UINT64_MAX;

  explicit DiskSpace(uint64_t n_units) : n_units_(n_units), bits_((n_units + 63) / 64) {}

  // The first unit of a free run of `n`, now taken; kNone if there is none. O(n_units / 64) at
  // worst.
  uint64_t Take(uint32_t n);
  // Takes this run; false, and nothing is taken, if part of it is taken. REQUIRES: within.
  bool TakeAt(uint64_t place, uint32_t n);
  // REQUIRES: the run is taken.
  void Free(uint64_t place, uint32_t n);

  uint64_t n_units() const { return n_units_; }
  uint64_t n_taken() const { return n_taken_; }

 private:
  bool IsTaken(uint64_t unit) const { return (bits_[unit / 64] >> (unit % 64) & 1) != 0; }
  uint64_t Search(uint64_t begin, uint64_t end, uint32_t n) const;
  void Mark(uint64_t place, uint32_t n);

  uint64_t n_units_;
  uint64_t n_taken_ = 0;
  uint64_t next_ = 0;
  std::vector<uint64_t> bits_;
};

}  // namespace kvmem
