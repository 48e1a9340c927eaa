#include "disk/disk_space.h"

#include <algorithm>

namespace kvmem {

uint64_t DiskSpace::Take(uint32_t n) {
  if (n > n_units_ - n_taken_) return kNone;
  uint64_t place = Search(next_, n_units_, n);
  // A run over next_ counts, too.
  if (place == kNone) place = Search(0, std::min(n_units_, next_ + n), n);
  if (place == kNone) return kNone;
  Mark(place, n);
  next_ = place + n;
  return place;
}

uint64_t DiskSpace::Search(uint64_t begin, uint64_t end, uint32_t n) const {
  uint64_t run = 0;
  for (uint64_t unit = begin; unit < end;) {
    if (unit % 64 == 0 && bits_[unit / 64] == UINT64_MAX) {
      run = 0;
      unit += 64;
      continue;
    }
    run = IsTaken(unit) ? 0 : run + 1;
    ++unit;
    if (run == n) return unit - n;
  }
  return kNone;
}

bool DiskSpace::TakeAt(uint64_t place, uint32_t n) {
  for (uint64_t unit = place; unit < place + n; ++unit) {
    if (IsTaken(unit)) return false;
  }
  Mark(place, n);
  return true;
}

void DiskSpace::Mark(uint64_t place, uint32_t n) {
  for (uint64_t unit = place; unit < place + n; ++unit)
    bits_[unit / 64] |= uint64_t{1} << unit % 64;
  n_taken_ += n;
}

void DiskSpace::Free(uint64_t place, uint32_t n) {
  for (uint64_t unit = place; unit < place + n; ++unit) {
    bits_[unit / 64] &= ~(uint64_t{1} << unit % 64);
  }
  n_taken_ -= n;
}

}  // namespace kvmem
