// The contract of an eviction order: it is told what happens to published blocks and names the next
// victim. One file an order; MakeOrder() and OrderNames() list them.
//
// Thread safety: none; HostTier's lock guards it.
//
// What every order keeps (tests/unit/test_eviction_orders.py runs one suite over all):
//   1. Only a block that index.Evictable() is named a victim: leaf first keeps prefixes closed
//      (I2), leases hold (I3).
//   2. A use of a block is a use of all its ancestors. None of them is walked for it: an ancestor
//      can't be a victim before the block is gone, and then Bare() hands the block's worth up.
//   3. Choosing is O(1) amortised: a block that is met and can't go is put aside ("dormant"), and
//      Rest() or Bare() brings it back when it can. No call looks at all blocks.
//   4. Every evictable block is linked, so nothing that could make room is forgotten.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "index/prefix_index.h"
#include "pool/slot_links.h"

namespace kvmem {

class EvictionOrder {
 public:
  virtual ~EvictionOrder() = default;

  // A block has been published. REQUIRES: its parent, if it has one, was admitted and not dropped.
  virtual void Admit(SlotId slot) = 0;

  // A prompt was answered with this block and all its ancestors.
  virtual void Use(SlotId slot) = 0;

  // The block's last lease ended, or what was below it left without being evicted.
  virtual void Rest(SlotId slot) = 0;

  // The block has become a leaf because its last child was evicted just now.
  virtual void Bare(SlotId slot) = 0;

  // The block leaves for another reason than eviction. Called before the index forgets it.
  virtual void Drop(SlotId slot) = 0;

  // The block is evicted, but not as this order's choice. Called before the index forgets it; if
  // that makes its parent a leaf, Bare() of the parent follows.
  virtual void Cut(SlotId slot) { Drop(slot); }

  // All blocks leave at once.
  virtual void DropAll() = 0;

  // The next victim, already forgotten by the order; kNoSlot if no block may go. n_incoming blocks
  // hold slots and will be admitted when they are complete.
  virtual SlotId PopVictim(uint32_t n_incoming) = 0;

  // Bytes of this order's own tables: those kept for each cached block, and those for blocks gone.
  virtual size_t bytes() const = 0;
  virtual size_t ghost_bytes() const = 0;

  // Adds one line for every breach. `published[slot]` says which blocks the order should know.
  virtual void Check(const std::vector<bool>& published,
                     std::vector<std::string>* faults) const = 0;
};

// nullptr for a name that is not in OrderNames(). The index and links must outlive the order.
std::unique_ptr<EvictionOrder> MakeOrder(std::string_view name, const PrefixIndex& index,
                                         SlotLinks* links);

// Sorted.
const std::vector<std::string>& OrderNames();

}  // namespace kvmem
