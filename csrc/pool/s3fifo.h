// S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, Algorithm 1)
// for a forest whose leaves go first. A small queue lets blocks that are used once pass through; a
// main queue keeps those used again; a ghost remembers what left the small queue.
//
// As in the paper: the small queue's share is 10 %, uses are counted up to 3, a block of the main
// queue goes round once for every use, a block remembered by the ghost starts in the main queue.
// Changed:
//   - One use is enough for the main queue (the paper asks for two): a prompt is stored once and
//     read once a turn, and a prompt used twice must outlive a burst of prompts used once.
//   - A use counts at the deepest block. A block moving to the main queue takes its ancestors
//     along, since they were used as often: the parent of a main block is main (checked).
//   - What is reserved and not published counts as small, so that a burst pays with its own blocks.
//   - A block that has children or leases goes dormant in its class; see eviction.h.
//
// Memory: 1 byte a slot; the ghost remembers as many keys as the main queue, at 4 bytes.
#pragma once

#include "pool/eviction.h"
#include "pool/ghost.h"

namespace kvmem {

class S3Fifo final : public EvictionOrder {
 public:
  S3Fifo(const PrefixIndex& index, SlotLinks* links);

  void Admit(SlotId slot) override;
  void Use(SlotId slot) override;
  void Rest(SlotId slot) override;
  void Bare(SlotId slot) override;
  void Drop(SlotId slot) override;
  void DropAll() override;
  SlotId PopVictim(uint32_t n_incoming) override;
  size_t bytes() const override { return blocks_.size() * sizeof(Block); }
  size_t ghost_bytes() const override { return ghost_.bytes(); }
  void Check(const std::vector<bool>& published, std::vector<std::string>* faults) const override;

 private:
  enum class Class : uint8_t { kNone, kSmall, kMain };
  struct Block {
    Class in : 2 = Class::kNone;
    uint8_t uses : 2 = 0;
  };
  static_assert(sizeof(Block) == 1);
  static constexpr uint8_t kMostUses = 3;

  SlotLinks::List& Queue(SlotId slot) { return blocks_[slot].in == Class::kMain ? main_ : small_; }
  void Promote(SlotId slot);
  SlotId StepSmall();
  SlotId StepMain();

  // Immutable.
  const PrefixIndex& index_;
  SlotLinks* const links_;
  const uint32_t small_target_;

  // Guarded by HostTier's lock.
  std::vector<Block> blocks_;
  SlotLinks::List small_;  // front: next to go
  SlotLinks::List main_;
  uint32_t n_small_ = 0;  // blocks of the class, dormant ones included
  uint32_t n_main_ = 0;
  Ghost ghost_;
};

}  // namespace kvmem
