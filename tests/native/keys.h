// Chained-looking keys for tests: a different 32 bytes for every (prompt,
// depth).
#pragma once

#include "index/key.h"

namespace kvmem {

inline Key TestKey(uint64_t prompt, uint64_t depth) {
  Key key;
  uint64_t x = prompt * 0x9e3779b97f4a7c15u + depth + 1;
  for (uint64_t& word : key.word) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    word = x ^= x >> 31;
  }
  return key;
}

// Blocks 1..n of one prompt.
class TestChain final : public KeyList {
 public:
  TestChain(uint64_t prompt, size_t n) : KeyList(n), prompt_(prompt) {}
  Key At(size_t i) const override { return TestKey(prompt_, i + 1); }

 private:
  const uint64_t prompt_;
};

}  // namespace kvmem
