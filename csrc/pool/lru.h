// Least recently used, exactly: the victim is the leaf whose last use lies furthest back, where a
// use of a block is a use of all its ancestors.
//
// No stamps. The list holds blocks by the last use that ended at them, oldest first. A block met at
// the front with children or leases is newer than it looks and goes dormant. Victims leave in
// ascending order of last use, so when a dormant block's last child is evicted, that child's last
// use is its own, nothing in the list is older, and it returns to the front. Of a leaf that others
// chose that does not hold, so its dormant parent takes its place in the list.
#pragma once

#include "pool/eviction.h"

namespace kvmem {

class Lru final : public EvictionOrder {
 public:
  Lru(const PrefixIndex& index, SlotLinks* links) : index_(index), links_(links) {}

  void Admit(SlotId slot) override;
  void Use(SlotId slot) override;
  void Rest(SlotId slot) override;
  void Bare(SlotId slot) override;
  void Drop(SlotId slot) override;
  void Cut(SlotId slot) override;
  void DropAll() override;
  SlotId PopVictim(uint32_t n_incoming) override;
  size_t bytes() const override { return 0; }
  size_t ghost_bytes() const override { return 0; }
  void Check(const std::vector<bool>& published, std::vector<std::string>* faults) const override;

 private:
  const PrefixIndex& index_;
  SlotLinks* const links_;
  SlotLinks::List list_;  // front: oldest
};

}  // namespace kvmem
