#include "pool/s3fifo.h"

#include <algorithm>

namespace kvmem {
namespace {

constexpr uint32_t kWasSmall = 1;

uint32_t SmallTarget(uint32_t n_slots) { return std::max(1u, n_slots / 10); }

}  // namespace

S3Fifo::S3Fifo(const PrefixIndex& index, SlotLinks* links)
    : index_(index),
      links_(links),
      small_target_(SmallTarget(index.n_slots())),
      blocks_(index.n_slots()),
      ghost_(index.n_slots() - index.n_slots() / 10) {}

void S3Fifo::Admit(SlotId slot) {
  blocks_[slot] = Block{Class::kSmall, 0};
  ++n_small_;
  links_->PushBack(&small_, slot);
  if (ghost_.Take(index_.key(slot))) Promote(slot);
}

void S3Fifo::Use(SlotId slot) {
  if (blocks_[slot].uses < kMostUses) ++blocks_[slot].uses;
  Rest(slot);
}

void S3Fifo::Rest(SlotId slot) {
  if (!links_->Linked(slot)) links_->PushBack(&Queue(slot), slot);
}

void S3Fifo::Bare(SlotId slot) {
  if (!links_->Linked(slot)) links_->PushFront(&Queue(slot), slot);
}

void S3Fifo::Drop(SlotId slot) {
  if (links_->Linked(slot)) links_->Remove(&Queue(slot), slot);
  --(blocks_[slot].in == Class::kMain ? n_main_ : n_small_);
  blocks_[slot] = Block{};
}

void S3Fifo::DropAll() {
  while (links_->PopFront(&small_) != kNoSlot) {
  }
  while (links_->PopFront(&main_) != kNoSlot) {
  }
  std::fill(blocks_.begin(), blocks_.end(), Block{});
  n_small_ = n_main_ = 0;
}

// Walks up to the first ancestor that is main already: once in the life of each block.
void S3Fifo::Promote(SlotId slot) {
  blocks_[slot].uses = 0;
  for (; slot != kNoSlot && blocks_[slot].in == Class::kSmall; slot = index_.parent(slot)) {
    const bool linked = links_->Linked(slot);
    if (linked) links_->Remove(&small_, slot);
    blocks_[slot].in = Class::kMain;
    --n_small_;
    ++n_main_;
    if (linked) links_->PushBack(&main_, slot);
  }
}

SlotId S3Fifo::PopVictim(uint32_t n_incoming) {
  while (small_.size + main_.size > 0) {
    const bool small_is_full = n_small_ + n_incoming >= small_target_;
    const bool from_small = small_.size > 0 && (small_is_full || main_.size == 0);
    const SlotId victim = from_small ? StepSmall() : StepMain();
    if (victim != kNoSlot) return victim;
  }
  return kNoSlot;
}

// Each step takes one block out of its queue: as a victim, to the main queue, or to sleep.
SlotId S3Fifo::StepSmall() {
  const SlotId slot = small_.front;
  if (blocks_[slot].uses > 0) {
    Promote(slot);
    return kNoSlot;
  }
  if (!index_.Evictable(slot)) {
    links_->Remove(&small_, slot);
    return kNoSlot;
  }
  ghost_.Add(index_.key(slot), kWasSmall);
  Drop(slot);
  return slot;
}

SlotId S3Fifo::StepMain() {
  const SlotId slot = links_->PopFront(&main_);
  if (!index_.Evictable(slot)) return kNoSlot;
  if (blocks_[slot].uses > 0) {
    --blocks_[slot].uses;
    links_->PushBack(&main_, slot);
    return kNoSlot;
  }
  Drop(slot);
  return slot;
}

void S3Fifo::Check(const std::vector<bool>& published, std::vector<std::string>* faults) const {
  std::vector<Class> queued(published.size(), Class::kNone);
  for (const auto& [list, in] : {std::pair(&small_, Class::kSmall), {&main_, Class::kMain}}) {
    const std::vector<SlotId> members = links_->Members(*list);
    if (members.size() != list->size) faults->push_back("s3fifo: a queue is broken");
    for (const SlotId slot : members) queued[slot] = in;
  }
  uint32_t n_small = 0;
  uint32_t n_main = 0;
  for (SlotId slot = 0; slot < published.size(); ++slot) {
    const std::string name = "slot " + std::to_string(slot);
    const Class in = blocks_[slot].in;
    n_small += in == Class::kSmall;
    n_main += in == Class::kMain;
    if (published[slot] != (in != Class::kNone)) {
      faults->push_back("s3fifo: " + name + " is known and unpublished, or the reverse");
    }
    if (queued[slot] != Class::kNone && queued[slot] != in) {
      faults->push_back("s3fifo: " + name + " is in the wrong queue");
    }
    if (index_.Evictable(slot) && queued[slot] == Class::kNone) {
      faults->push_back("s3fifo: forgot evictable " + name);
    }
    const SlotId parent = index_.parent(slot);
    if (in == Class::kMain && parent != kNoSlot && blocks_[parent].in != Class::kMain) {
      faults->push_back("s3fifo: main " + name + " has a small parent");
    }
  }
  if (n_small != n_small_ || n_main != n_main_) faults->push_back("s3fifo: a class is miscounted");
}

}  // namespace kvmem
