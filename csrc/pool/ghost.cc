#include "pool/ghost.h"

namespace kvmem {

void Ghost::Add(const Key& key, uint32_t mark) {
  const uint64_t mixed = Mix(key);
  std::atomic<uint32_t>* const set = Set(mixed);
  const uint32_t print = Print(mixed);
  size_t last = 0;  // what ends here makes room: the same key, an empty word or the oldest
  while (last + 1 < kWays) {
    const uint32_t word = set[last].load(std::memory_order_relaxed);
    if (word == 0 || (word & ~kMarkMask) == print) break;
    ++last;
  }
  for (; last > 0; --last) {
    set[last].store(set[last - 1].load(std::memory_order_relaxed), std::memory_order_release);
  }
  set[0].store(print | mark, std::memory_order_release);
}

uint32_t Ghost::Mark(const Key& key) const {
  const uint64_t mixed = Mix(key);
  const std::atomic<uint32_t>* const set = Set(mixed);
  for (size_t way = 0; way < kWays; ++way) {
    const uint32_t word = set[way].load(std::memory_order_acquire);
    if (word != 0 && (word & ~kMarkMask) == Print(mixed)) return word & kMarkMask;
  }
  return 0;
}

bool Ghost::Take(const Key& key) {
  const uint64_t mixed = Mix(key);
  std::atomic<uint32_t>* const set = Set(mixed);
  for (size_t way = 0; way < kWays; ++way) {
    const uint32_t word = set[way].load(std::memory_order_relaxed);
    if (word == 0 || (word & ~kMarkMask) != Print(mixed)) continue;
    for (; way + 1 < kWays; ++way) {
      set[way].store(set[way + 1].load(std::memory_order_relaxed), std::memory_order_release);
    }
    set[kWays - 1].store(0, std::memory_order_release);
    return true;
  }
  return false;
}

}  // namespace kvmem
