#include "pool/lru.h"

namespace kvmem {

void Lru::Admit(SlotId slot) { links_->PushBack(&list_, slot); }

void Lru::Use(SlotId slot) {
  if (links_->Linked(slot)) links_->Remove(&list_, slot);
  links_->PushBack(&list_, slot);
}

// A lease is a use that lasts until it ends.
void Lru::Rest(SlotId slot) { Use(slot); }

void Lru::Bare(SlotId slot) {
  if (!links_->Linked(slot)) links_->PushFront(&list_, slot);
}

void Lru::Drop(SlotId slot) {
  if (links_->Linked(slot)) links_->Remove(&list_, slot);
}

void Lru::Cut(SlotId slot) {
  const SlotId parent = index_.parent(slot);
  const bool bare = parent != kNoSlot && index_.children(parent) == 1 &&
                    index_.state(parent) == BlockState::kPublished && !links_->Linked(parent);
  if (bare && links_->Linked(slot)) links_->PutBefore(&list_, slot, parent);
  Drop(slot);
}

void Lru::DropAll() {
  while (links_->PopFront(&list_) != kNoSlot) {
  }
}

SlotId Lru::PopVictim(uint32_t /*n_incoming*/) {
  for (;;) {
    const SlotId slot = links_->PopFront(&list_);
    if (slot == kNoSlot || index_.Evictable(slot)) return slot;
  }
}

void Lru::Check(const std::vector<bool>& published, std::vector<std::string>* faults) const {
  const std::vector<SlotId> members = links_->Members(list_);
  std::vector<bool> linked(published.size(), false);
  for (const SlotId slot : members) {
    if (!published[slot]) faults->push_back("lru: holds unpublished slot " + std::to_string(slot));
    linked[slot] = true;
  }
  if (members.size() != list_.size) faults->push_back("lru: its list is broken");
  for (SlotId slot = 0; slot < published.size(); ++slot) {
    if (index_.Evictable(slot) && !linked[slot]) {
      faults->push_back("lru: forgot evictable slot " + std::to_string(slot));
    }
  }
}

}  // namespace kvmem
