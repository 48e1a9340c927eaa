// PrefixIndex::Check: reads every structure against the others and trusts none.
#include <string>
#include <vector>

#include "index/prefix_index.h"

namespace kvmem {
namespace {

bool Indexed(BlockState state) {
  return state == BlockState::kPending || state == BlockState::kPublished;
}

std::string Slot(SlotId slot) { return "slot " + std::to_string(slot); }

}  // namespace

void PrefixIndex::Check(std::vector<std::string>* faults) const {
  CheckTable(faults);
  CheckForest(faults);
}

void PrefixIndex::CheckTable(std::vector<std::string>* faults) const {
  size_t n_entries = 0;
  size_t n_indexed = 0;
  for (size_t cell = 0; cell < n_cells_; ++cell) {
    const uint64_t entry = cells_[cell].load(std::memory_order_relaxed);
    if (entry == 0) continue;
    ++n_entries;
    const SlotId slot = static_cast<SlotId>(entry) - 1;
    if (slot >= n_slots_ || !Indexed(state(slot))) {
      faults->push_back("index 1: the table names " + Slot(slot) + ", which is not indexed");
    }
  }
  for (SlotId slot = 0; slot < n_slots_; ++slot) {
    if (!Indexed(state(slot))) continue;
    ++n_indexed;
    const SlotId found = Find(key(slot));
    if (found != slot) {
      faults->push_back("index 1: the key of " + Slot(slot) + " leads to " +
                        (found == kNoSlot ? "nothing" : Slot(found)));
    } else if (StateOf(key(slot)) != state(slot)) {
      faults->push_back("index 4: readers are told otherwise of " + Slot(slot));
    }
  }
  if (n_entries != n_indexed) {
    faults->push_back("index 1: " + std::to_string(n_entries) + " entries for " +
                      std::to_string(n_indexed) + " indexed blocks");
  }
}

void PrefixIndex::CheckForest(std::vector<std::string>* faults) const {
  std::vector<uint32_t> children(n_slots_, 0);
  for (SlotId slot = 0; slot < n_slots_; ++slot) {
    const BlockState own = state(slot);
    const SlotId up = parent(slot);
    if (own != BlockState::kFree && generation(slot) == 0) {
      faults->push_back("I3: " + Slot(slot) + " is in use with generation 0");
    }
    if ((own == BlockState::kPublished) != ((tiers(slot) & kTierHost) != 0)) {
      faults->push_back("I4: the tiers of " + Slot(slot) + " do not fit its state");
    }
    if (up == kNoSlot) {
      if (Indexed(own) && depth(slot) != 1) {
        faults->push_back("I2: " + Slot(slot) + " has no parent but depth " +
                          std::to_string(depth(slot)));
      }
      continue;
    }
    if (up >= n_slots_ || own == BlockState::kFree || own == BlockState::kOrphan ||
        own == BlockState::kKept) {
      faults->push_back("I2: " + Slot(slot) + " should have no parent");
      continue;
    }
    ++children[up];
    const BlockState above = state(up);
    const bool closed = own == BlockState::kPublished ? above == BlockState::kPublished
                        : own == BlockState::kPending
                            ? Indexed(above)
                            : above == BlockState::kPublished || above == BlockState::kCondemned;
    if (!closed) faults->push_back("I2: the parent of " + Slot(slot) + " is not cached");
    if (depth(slot) != depth(up) + 1) {
      faults->push_back("I2: the depth of " + Slot(slot) + " is not its parent's plus one");
    }
  }
  for (SlotId slot = 0; slot < n_slots_; ++slot) {
    if (children[slot] != this->children(slot)) {
      faults->push_back("index 3: " + Slot(slot) + " counts " +
                        std::to_string(this->children(slot)) + " children and has " +
                        std::to_string(children[slot]));
    }
  }
}

}  // namespace kvmem
