// Doubly linked lists of slots: free slots, pending blocks and the queues of an eviction order. A
// slot is in at most one of them, so all share two arrays.
//
// Thread safety: none; HostTier's lock guards it.
//
// Memory: 8 bytes a slot.
#pragma once

#include <vector>

#include "index/prefix_index.h"

namespace kvmem {

class SlotLinks {
 public:
  struct List {
    SlotId front = kNoSlot;
    SlotId back = kNoSlot;
    uint32_t size = 0;
  };

  explicit SlotLinks(uint32_t n_slots) : previous_(n_slots, kUnlinked), next_(n_slots, kUnlinked) {}
  SlotLinks(const SlotLinks&) = delete;
  SlotLinks& operator=(const SlotLinks&) = delete;

  bool Linked(SlotId slot) const { return previous_[slot] != kUnlinked; }
  SlotId Next(SlotId slot) const { return next_[slot]; }

  // REQUIRES: !Linked(slot).
  void PushBack(List* list, SlotId slot) {
    previous_[slot] = list->back;
    next_[slot] = kNoSlot;
    (list->back == kNoSlot ? list->front : next_[list->back]) = slot;
    list->back = slot;
    ++list->size;
  }

  // REQUIRES: !Linked(slot).
  void PushFront(List* list, SlotId slot) {
    previous_[slot] = kNoSlot;
    next_[slot] = list->front;
    (list->front == kNoSlot ? list->back : previous_[list->front]) = slot;
    list->front = slot;
    ++list->size;
  }

  // REQUIRES: slot is in this list, !Linked(other).
  void PutBefore(List* list, SlotId slot, SlotId other) {
    const SlotId before = previous_[slot];
    previous_[other] = before;
    next_[other] = slot;
    (before == kNoSlot ? list->front : next_[before]) = other;
    previous_[slot] = other;
    ++list->size;
  }

  // REQUIRES: slot is in this list.
  void Remove(List* list, SlotId slot) {
    const SlotId before = previous_[slot];
    const SlotId after = next_[slot];
    (before == kNoSlot ? list->front : next_[before]) = after;
    (after == kNoSlot ? list->back : previous_[after]) = before;
    previous_[slot] = next_[slot] = kUnlinked;
    --list->size;
  }

  // The first slot, taken out, or kNoSlot.
  SlotId PopFront(List* list) {
    const SlotId slot = list->front;
    if (slot != kNoSlot) Remove(list, slot);
    return slot;
  }

  // The list's slots from front to back; stops after n_slots + 1 if it has been corrupted.
  std::vector<SlotId> Members(const List& list) const {
    std::vector<SlotId> members;
    for (SlotId slot = list.front; slot < next_.size() && members.size() <= next_.size();
         slot = next_[slot]) {
      members.push_back(slot);
    }
    return members;
  }

  size_t bytes() const { return (previous_.size() + next_.size()) * sizeof(SlotId); }

 private:
  friend struct HostTierPeer;  // tests break things through it

  static constexpr SlotId kUnlinked = 0xfffffffeu;

  std::vector<SlotId> previous_;
  std::vector<SlotId> next_;
};

}  // namespace kvmem
