// What a prompt's published depth was, step by step, told by its one writer to readers beside it.
// The writer announces a depth before it acts and confirms it after, so inside a call that saw
// `confirmed` = b and `announced` = e at its ends the depth was one of entries b-1 .. e-1.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

namespace kvmem {

struct Story {
  // Starts at depth 0. REQUIRES: Announce() is called n_steps times at most.
  explicit Story(uint32_t n_steps) : depth(n_steps + 1) {}

  std::vector<std::atomic<uint32_t>> depth;
  std::atomic<uint32_t> announced{1};
  std::atomic<uint32_t> confirmed{1};

  void Announce(uint32_t value) {
    const uint32_t at = announced.load(std::memory_order_relaxed);
    depth[at].store(value, std::memory_order_relaxed);
    announced.store(at + 1, std::memory_order_release);
  }
  void Confirm() {
    confirmed.store(announced.load(std::memory_order_relaxed), std::memory_order_release);
  }
  // The lowest and highest depth since `from`, which is what `confirmed` was.
  std::pair<uint32_t, uint32_t> Range(uint32_t from) const {
    const uint32_t to = announced.load(std::memory_order_acquire);
    uint32_t low = UINT32_MAX;
    uint32_t high = 0;
    for (uint32_t i = from - 1; i < to; ++i) {
      low = std::min(low, depth[i].load(std::memory_order_relaxed));
      high = std::max(high, depth[i].load(std::memory_order_relaxed));
    }
    return {low, high};
  }
};

}  // namespace kvmem
