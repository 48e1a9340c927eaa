// HostTier::CheckIntegrity: I2, I3, I7 and every count, from the structures themselves.
#include <string>
#include <vector>

#include "pool/host_tier.h"

namespace kvmem {
namespace {

std::string Slot(SlotId slot) { return "slot " + std::to_string(slot); }

}  // namespace

std::vector<std::string> HostTier::CheckIntegrity() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> faults;
  index_.Check(&faults);
  CheckSlots(&faults);
  CheckLeases(&faults);
  std::vector<bool> published(index_.n_slots());
  for (SlotId slot = 0; slot < index_.n_slots(); ++slot) {
    published[slot] = index_.state(slot) == BlockState::kPublished;
  }
  order_->Check(published, &faults);
  return faults;
}

void HostTier::CheckSlots(std::vector<std::string>* faults) const {
  std::array<uint64_t, 6> n_in{};
  for (SlotId slot = 0; slot < index_.n_slots(); ++slot) {
    ++n_in[static_cast<size_t>(index_.state(slot))];
  }
  const auto n = [&](BlockState state) { return n_in[static_cast<size_t>(state)]; };
  const auto list = [&](const SlotLinks::List& members, BlockState state, const char* name) {
    const std::vector<SlotId> slots = links_.Members(members);
    for (const SlotId slot : slots) {
      if (index_.state(slot) != state) {
        faults->push_back("I7: " + Slot(slot) + " is in the " + name + " list and is not " + name);
      }
    }
    if (slots.size() != n(state) || members.size != n(state)) {
      faults->push_back(std::string("I7: the ") + name + " list holds " +
                        std::to_string(slots.size()) + " of " + std::to_string(n(state)));
    }
  };
  list(free_, BlockState::kFree, "free");
  list(pending_, BlockState::kPending, "pending");
  list(kept_, BlockState::kKept, "kept");
  if (kept_.size > keep_) {
    faults->push_back("I7: " + std::to_string(kept_.size) + " blocks are kept, " +
                      std::to_string(keep_) + " may be");
  }
  for (const SlotId slot : failed_) {
    if (slot >= index_.n_slots() || index_.state(slot) != BlockState::kCondemned) {
      faults->push_back("I7: " + Slot(slot) + " is to be kept and is not condemned");
    }
  }
  if (n(BlockState::kPublished) != n_published_ || n(BlockState::kOrphan) != n_orphaned_) {
    faults->push_back("I7: published or orphaned blocks are miscounted");
  }
}

void HostTier::CheckLeases(std::vector<std::string>* faults) const {
  std::vector<uint32_t> held(index_.n_slots(), 0);
  for (const auto& [lease, slot] : leases_) {
    if (slot >= index_.n_slots()) {
      faults->push_back("I3: lease " + std::to_string(lease) + " names no slot");
      continue;
    }
    ++held[slot];
  }
  uint64_t n_leased = 0;
  for (SlotId slot = 0; slot < index_.n_slots(); ++slot) {
    const BlockState state = index_.state(slot);
    const bool may_hold = state == BlockState::kPublished || state == BlockState::kCondemned;
    n_leased += held[slot] > 0;
    if (held[slot] != index_.leases(slot)) {
      faults->push_back("I3: " + Slot(slot) + " counts " + std::to_string(index_.leases(slot)) +
                        " leases and has " + std::to_string(held[slot]));
    }
    if (held[slot] > 0 && !may_hold) {
      faults->push_back("I3: " + Slot(slot) + " is leased and holds no block");
    }
    if (state == BlockState::kCondemned && held[slot] == 0 && index_.children(slot) == 0) {
      faults->push_back("I3: " + Slot(slot) + " is condemned and nobody holds it");
    }
  }
  if (n_leased != n_leased_) faults->push_back("I3: leased blocks are miscounted");
}

}  // namespace kvmem
