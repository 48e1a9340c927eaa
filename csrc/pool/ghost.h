// A bounded memory of keys that are gone: 4 bytes a key, the oldest of a set leaves first.
//
// A key is 29 bits of fingerprint inside one of many sets of 16, with a 3-bit mark. A key that was
// never here is mistaken for one that was about three times in 10^8, which only ever moves a hint
// or the wording of an explanation: identity is never decided here (I1).
//
// Thread safety: Mark() may run in any number of threads beside one writer. A key that is here and
// is neither added again nor taken meanwhile is found: entries move up, and readers look upward.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "index/key.h"

namespace kvmem {

class Ghost {
 public:
  // Remembers about `capacity` keys. REQUIRES: capacity <= 2^31.
  explicit Ghost(size_t capacity)
      : n_sets_((capacity + kWays - 1) / kWays),
        words_(std::make_unique<std::atomic<uint32_t>[]>(n_sets_ * kWays)) {}

  // Remembers the key with a mark of 1 to 7, in place of what was remembered of it.
  void Add(const Key& key, uint32_t mark);

  // The mark of the key, or 0.
  uint32_t Mark(const Key& key) const;

  // Forgets the key; true if it was here.
  bool Take(const Key& key);

  size_t bytes() const { return n_sets_ * kWays * sizeof(uint32_t); }

 private:
  static constexpr size_t kWays = 16;
  static constexpr int kMarkBits = 3;
  static constexpr uint32_t kMarkMask = (1u << kMarkBits) - 1;

  std::atomic<uint32_t>* Set(uint64_t mixed) const {
    return &words_[((mixed >> 32) * n_sets_ >> 32) * kWays];
  }
  static uint32_t Print(uint64_t mixed) { return static_cast<uint32_t>(mixed) & ~kMarkMask; }

  const size_t n_sets_;
  const std::unique_ptr<std::atomic<uint32_t>[]> words_;  // 0 is empty
};

}  // namespace kvmem
