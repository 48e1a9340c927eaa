#include "pool/host_tier.h"

#include <algorithm>
#include <utility>

namespace kvmem {
namespace {

constexpr size_t kLeastGone = 1024;
// A generation has 48 bits in the index; what a store claims beyond that is no generation.
constexpr uint64_t kMaxRestored = uint64_t{1} << 47;

uint32_t MarkOf(Fate fate) { return static_cast<uint32_t>(fate); }

uint64_t PerBlock(size_t bytes, uint32_t n_slots) { return (bytes + n_slots - 1) / n_slots; }

}  // namespace

std::unique_ptr<HostTier> HostTier::Create(uint32_t n_slots, std::string_view order,
                                           uint32_t keep) {
  std::unique_ptr<HostTier> tier(new HostTier(n_slots, order, keep));
  return tier->order_ ? std::move(tier) : nullptr;
}

HostTier::HostTier(uint32_t n_slots, std::string_view order, uint32_t keep)
    : keep_(keep),
      index_(n_slots),
      gone_(std::max(kLeastGone, size_t{n_slots} + n_slots / 2)),
      links_(n_slots),
      order_(MakeOrder(order, index_, &links_)) {
  for (SlotId slot = 0; slot < n_slots; ++slot) links_.PushBack(&free_, slot);
}

Fate HostTier::Why(const Key& key) const {
  // The index first: a block is remembered as gone before it leaves the index.
  switch (index_.StateOf(key)) {
    case BlockState::kPending:
      return Fate::kPending;
    case BlockState::kPublished:
      return Fate::kPublished;
    default:
      return static_cast<Fate>(gone_.Mark(key));
  }
}

// ---------------------------------------------------------------------------------------------
// Reading: leases

HostTier::Acquired HostTier::Acquire(const KeyList& keys, size_t start, size_t limit, bool use) {
  Acquired acquired;
  limit = std::min(limit, keys.size());
  const std::lock_guard lock(mutex_);
  size_t n = index_.Match(keys, limit, std::min(start, limit));
  if (n == 0) return acquired;
  const SlotId deepest = index_.Find(keys.At(n - 1));
  const size_t n_wanted = n > start ? n - start : 0;
  acquired.slots.resize(n_wanted);
  acquired.generations.resize(n_wanted);
  SlotId slot = deepest;
  for (size_t i = n_wanted; i-- > 0; slot = index_.parent(slot)) {
    // I1: the walk goes by parents, the promise by keys; keys that are no chain match nothing.
    if (slot == kNoSlot || index_.key(slot) != keys.At(start + i)) return Acquired{};
    acquired.slots[i] = static_cast<int32_t>(slot);
    acquired.generations[i] = index_.generation(slot);
  }
  acquired.n = n;
  if (use) order_->Use(deepest);
  if (n_wanted == 0) return acquired;
  leases_.emplace(next_lease_, deepest);
  acquired.lease = next_lease_++;
  n_leased_ += index_.leases(deepest) == 0;
  index_.AddLease(deepest);
  return acquired;
}

LeaseResult HostTier::Extend(uint64_t lease, const KeyList& keys, size_t n) {
  const std::lock_guard lock(mutex_);
  const auto found = leases_.find(lease);
  if (found == leases_.end()) return LeaseResult::kUnknownLease;
  const SlotId from = found->second;
  const size_t depth = index_.depth(from);
  if (n <= depth || index_.state(from) != BlockState::kPublished) return LeaseResult::kOk;
  if (index_.key(from) != keys.At(depth - 1)) return LeaseResult::kNotBelow;
  const size_t deepest = index_.Match(keys, n, depth);
  const SlotId to = index_.Find(keys.At(deepest - 1));
  // I3: the lease may only move to where it still holds the blocks it held.
  SlotId above = to;
  while (above != kNoSlot && index_.depth(above) > depth) above = index_.parent(above);
  if (above != from) return LeaseResult::kNotBelow;
  if (to == from) return LeaseResult::kOk;
  n_leased_ += index_.leases(to) == 0;
  index_.AddLease(to);
  DropLease(from);
  found->second = to;
  return LeaseResult::kOk;
}

bool HostTier::Release(uint64_t lease) {
  const std::lock_guard lock(mutex_);
  const auto found = leases_.find(lease);
  if (found == leases_.end()) return false;
  const SlotId slot = found->second;
  leases_.erase(found);
  DropLease(slot);
  if (index_.state(slot) == BlockState::kPublished) {
    if (index_.leases(slot) == 0) order_->Rest(slot);
  } else {
    LetGo(slot);
  }
  return true;
}

void HostTier::DropLease(SlotId slot) {
  index_.DropLease(slot);
  n_leased_ -= index_.leases(slot) == 0;
}

// ---------------------------------------------------------------------------------------------
// An earlier run's blocks

std::vector<size_t> HostTier::Restore(const Recovered& blocks) {
  std::vector<size_t> lost;
  std::vector<size_t> early;  // before their parents
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < blocks.n; ++i) {
    bool orphan = false;
    if (!RestoreOne(blocks, i, &orphan)) (orphan ? early : lost).push_back(i);
  }
  RestoreEarly(blocks, early, &lost);
  std::sort(lost.begin(), lost.end());
  return lost;
}

// Those that came before their parents, if their parents came at all. Mostly few: threads that
// write side by side.
void HostTier::RestoreEarly(const Recovered& blocks, const std::vector<size_t>& early,
                            std::vector<size_t>* gone) {
  enum : uint8_t { kUnseen, kOnPath, kHere, kLost };
  struct KeyHash {
    size_t operator()(const Key& key) const { return static_cast<size_t>(Mix(key)); }
  };
  std::unordered_map<Key, size_t, KeyHash> by_key;  // to their place in `early`
  std::vector<uint8_t> place(early.size(), kUnseen);
  const auto parent = [&](size_t at) { return LoadKey(blocks.parents + early[at] * kKeyBytes); };
  by_key.reserve(early.size());
  for (size_t at = 0; at < early.size(); ++at) {
    if (!by_key.emplace(LoadKey(blocks.keys + early[at] * kKeyBytes), at).second) place[at] = kLost;
  }
  std::vector<size_t> path;
  for (size_t first = 0; first < early.size(); ++first) {
    // Up to the first block that is decided, then down again: parents first (I2).
    bool lost = false;
    for (size_t at = first; place[at] == kUnseen;) {
      place[at] = kOnPath;
      path.push_back(at);
      const auto above = by_key.find(parent(at));
      if (above == by_key.end()) break;  // RestoreOne() knows whether it is there by now
      at = above->second;
      lost = place[at] == kLost || place[at] == kOnPath;
    }
    for (; !path.empty(); path.pop_back()) {
      bool orphan = false;
      lost = lost || !RestoreOne(blocks, early[path.back()], &orphan);
      place[path.back()] = lost ? kLost : kHere;
    }
  }
  for (size_t at = 0; at < early.size(); ++at) {
    if (place[at] == kLost) gone->push_back(early[at]);
  }
}

// False if it can't be; *orphan: since its parent is not here.
bool HostTier::RestoreOne(const Recovered& blocks, size_t i, bool* orphan) {
  const int32_t at = blocks.slots[i];
  if (at < 0 || static_cast<uint32_t>(at) >= index_.n_slots()) return false;
  const SlotId slot = static_cast<SlotId>(at);
  const Key key = LoadKey(blocks.keys + i * kKeyBytes);
  const Key above = LoadKey(blocks.parents + i * kKeyBytes);
  const SlotId parent = above == Key{} ? kNoSlot : index_.Find(above);
  *orphan = above != Key{} && parent == kNoSlot;
  if (*orphan || index_.state(slot) != BlockState::kFree || index_.Find(key) != kNoSlot ||
      blocks.generations[i] == 0 || blocks.generations[i] >= kMaxRestored) {
    return false;
  }
  links_.Remove(&free_, slot);
  index_.SetGeneration(slot, blocks.generations[i] - 1);
  index_.Add(slot, key, parent);
  index_.Publish(slot, blocks.checksums[i], kTierHost);
  order_->Admit(slot);
  ++n_published_;
  ++inserts_;
  return true;
}

// ---------------------------------------------------------------------------------------------
// Writing: reserve, then publish or abandon

HostTier::Reserved HostTier::Reserve(const KeyList& keys, size_t start, size_t stop) {
  Reserved reserved;
  reserved.index.reserve(stop - start);
  reserved.slots.reserve(stop - start);
  reserved.generations.reserve(stop - start);
  const std::lock_guard lock(mutex_);
  SlotId parent = kNoSlot;
  if (start > 0) {
    parent = index_.Find(keys.At(start - 1));
    if (parent == kNoSlot || index_.depth(parent) != start) {
      reserved.result = ReserveResult::kNoParent;
      return reserved;
    }
  }
  for (size_t i = start; i < stop; ++i) {
    const Key key = keys.At(i);
    const SlotId present = index_.Find(key);
    if (present != kNoSlot) {
      if (index_.parent(present) != parent) {
        reserved.result = ReserveResult::kNoParent;
        break;
      }
      parent = present;
      continue;
    }
    const SlotId slot = TakeSlot(parent);
    if (slot == kNoSlot) {
      reserved.result = ReserveResult::kNoRoom;
      break;
    }
    index_.Add(slot, key, parent);
    links_.PushBack(&pending_, slot);
    reserved.index.push_back(static_cast<int32_t>(i));
    reserved.slots.push_back(static_cast<int32_t>(slot));
    reserved.generations.push_back(index_.generation(slot));
    parent = slot;
  }
  return reserved;
}

// A free slot, or a victim's. The new block's parent, and with it every ancestor, must not be the
// victim: until the block hangs below it, a lease for the length of this call holds it.
SlotId HostTier::TakeSlot(SlotId parent) {
  SlotId slot = links_.PopFront(&free_);
  if (slot != kNoSlot) return slot;
  if (parent != kNoSlot) index_.AddLease(parent);
  const SlotId victim = order_->PopVictim(pending_.size);
  if (victim != kNoSlot) {
    EvictSlot(victim);
    slot = links_.PopFront(&free_);
  }
  if (parent != kNoSlot) {
    index_.DropLease(parent);
    // The order may have put it aside as leased; with no child to come it must come back.
    if (slot == kNoSlot && index_.Evictable(parent)) order_->Rest(parent);
  }
  // I7: what is kept for people costs no request its room.
  if (slot == kNoSlot) {
    slot = links_.PopFront(&kept_);
    if (slot != kNoSlot) index_.Free(slot);
  }
  return slot;
}

std::vector<int32_t> HostTier::Evict(size_t n) {
  const std::lock_guard lock(mutex_);
  std::vector<int32_t> gone;
  while (gone.size() < n) {
    const SlotId victim = order_->PopVictim(pending_.size);
    if (victim == kNoSlot) break;
    EvictSlot(victim);
    gone.push_back(static_cast<int32_t>(victim));
  }
  return gone;
}

HostTier::Tail HostTier::Cut(const KeyList& keys, size_t n) {
  Tail tail;
  const std::lock_guard lock(mutex_);
  const auto at = [&](size_t i) {
    const SlotId slot = index_.Find(keys.At(i));
    return slot != kNoSlot && index_.state(slot) == BlockState::kPublished ? slot : kNoSlot;
  };
  size_t low = 0;  // keys[0, low) are here (I2)
  for (size_t high = keys.size(); low < high;) {
    const size_t middle = low + (high - low) / 2;
    if (at(middle) != kNoSlot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  tail.present = low;
  SlotId slot = low > 0 ? at(low - 1) : kNoSlot;
  for (size_t left = std::min(n, low); left > 0 && index_.Evictable(slot); --left) {
    const SlotId parent = index_.parent(slot);
    order_->Cut(slot);
    EvictSlot(slot);
    tail.slots.push_back(static_cast<int32_t>(slot));
    // Keys that are no chain of this index end it where they part.
    if (left == 1 || parent == kNoSlot ||
        index_.key(parent) != keys.At(low - tail.slots.size() - 1)) {
      break;
    }
    slot = parent;
  }
  return tail;
}

std::vector<unsigned char> HostTier::TakeEvicted() {
  const std::lock_guard lock(mutex_);
  return std::exchange(evicted_, {});
}

// REQUIRES: the order has forgotten the slot already.
void HostTier::EvictSlot(SlotId slot) {
  const Key key = index_.key(slot);
  gone_.Add(key, MarkOf(Fate::kEvicted));
  if (evicted_.size() < kMostTold * kKeyBytes) {
    const auto* const bytes = reinterpret_cast<const unsigned char*>(&key);
    evicted_.insert(evicted_.end(), bytes, bytes + kKeyBytes);
  }
  const SlotId parent = index_.parent(slot);
  --n_published_;
  ++evictions_;
  FreeSlot(slot);
  if (parent != kNoSlot && index_.children(parent) == 0 &&
      index_.state(parent) == BlockState::kPublished) {
    order_->Bare(parent);
  }
}

void HostTier::FreeSlot(SlotId slot) {
  index_.Free(slot);
  links_.PushBack(&free_, slot);
}

size_t HostTier::Publish(const int32_t* slots, const uint64_t* generations,
                         const uint64_t* checksums, size_t n) {
  const std::lock_guard lock(mutex_);
  size_t n_done = 0;
  for (size_t i = 0; i < n; ++i) {
    if (!Owns(slots[i], generations[i])) continue;
    const SlotId slot = static_cast<SlotId>(slots[i]);
    const BlockState state = index_.state(slot);
    if (state != BlockState::kPending && state != BlockState::kOrphan) continue;
    const SlotId parent = index_.parent(slot);
    const bool closed = parent == kNoSlot || index_.state(parent) == BlockState::kPublished;  // I2
    if (state == BlockState::kOrphan || !closed) {
      AbandonSlot(slot);
      continue;
    }
    links_.Remove(&pending_, slot);
    index_.Publish(slot, checksums[i], kTierHost);  // I4
    order_->Admit(slot);
    ++n_published_;
    ++n_done;
  }
  inserts_ += n_done;
  return n_done;
}

size_t HostTier::Abandon(const int32_t* slots, const uint64_t* generations, size_t n) {
  const std::lock_guard lock(mutex_);
  size_t n_freed = 0;
  for (size_t i = 0; i < n; ++i) {
    if (!Owns(slots[i], generations[i])) continue;
    const SlotId slot = static_cast<SlotId>(slots[i]);
    const BlockState state = index_.state(slot);
    if (state != BlockState::kPending && state != BlockState::kOrphan) continue;
    AbandonSlot(slot);
    ++n_freed;
  }
  return n_freed;
}

// A pending or orphaned slot whose writer is done with it.
void HostTier::AbandonSlot(SlotId slot) {
  ++abandoned_;
  if (index_.state(slot) == BlockState::kOrphan) {
    --n_orphaned_;
    FreeSlot(slot);
    return;
  }
  if (index_.children(slot) > 0) OrphanBelow(slot);
  gone_.Add(index_.key(slot), MarkOf(Fate::kAbandoned));
  const SlotId parent = index_.parent(slot);
  links_.Remove(&pending_, slot);
  FreeSlot(slot);
  if (parent != kNoSlot && index_.Evictable(parent)) order_->Rest(parent);
}

// What is below a pending block is pending, and stands behind it in the list, parents first.
void HostTier::OrphanBelow(SlotId root) {
  for (SlotId slot = links_.Next(root), next; slot != kNoSlot; slot = next) {
    next = links_.Next(slot);
    const SlotId parent = index_.parent(slot);
    if (parent == kNoSlot) continue;
    if (parent == root || index_.state(parent) == BlockState::kOrphan) Orphan(slot);
  }
}

void HostTier::Orphan(SlotId slot) {
  gone_.Add(index_.key(slot), MarkOf(Fate::kAbandoned));
  links_.Remove(&pending_, slot);
  index_.Detach(slot);
  ++n_orphaned_;
}

// ---------------------------------------------------------------------------------------------
// Taking out of matching

size_t HostTier::Quarantine(int32_t slot, uint64_t generation) {
  const std::lock_guard lock(mutex_);
  if (!Owns(slot, generation)) return 0;
  const SlotId root = static_cast<SlotId>(slot);
  const BlockState state = index_.state(root);
  if (state != BlockState::kPending && state != BlockState::kPublished) return 0;
  const SlotId parent = index_.parent(root);
  const std::vector<SlotId> subtree = Subtree(root);
  // One that is still being written has no bytes to look at.
  if (keep_ > 0 && state == BlockState::kPublished) failed_.insert(root);
  for (const SlotId below : subtree) {
    gone_.Add(index_.key(below), MarkOf(Fate::kQuarantined));
    if (index_.state(below) == BlockState::kPending) {
      links_.Remove(&pending_, below);
      ++n_orphaned_;
    } else {
      order_->Drop(below);
      --n_published_;
    }
    index_.Detach(below);
  }
  for (const SlotId below : subtree) {
    if (index_.state(below) == BlockState::kCondemned) LetGo(below);
  }
  if (parent != kNoSlot && index_.Evictable(parent)) order_->Rest(parent);
  quarantined_ += subtree.size();
  return subtree.size();
}

// The pending and published blocks of a subtree, deepest first, so that taking them out in this
// order keeps every instant prefix-closed for readers (I2).
std::vector<SlotId> HostTier::Subtree(SlotId root) const {
  if (index_.children(root) == 0) return {root};
  enum Place : uint8_t { kUnseen, kIn, kOut };
  std::vector<uint8_t> place(index_.n_slots(), kUnseen);
  place[root] = kIn;
  std::vector<SlotId> path;
  std::vector<SlotId> members;
  for (SlotId slot = 0; slot < index_.n_slots(); ++slot) {
    const BlockState state = index_.state(slot);
    if (state != BlockState::kPending && state != BlockState::kPublished) continue;
    path.clear();
    SlotId above = slot;
    for (; above != kNoSlot && place[above] == kUnseen; above = index_.parent(above)) {
      path.push_back(above);
    }
    const uint8_t found = above == kNoSlot ? uint8_t{kOut} : place[above];
    for (const SlotId passed : path) place[passed] = found;
    if (place[slot] == kIn) members.push_back(slot);
  }
  std::sort(members.begin(), members.end(),
            [&](SlotId a, SlotId b) { return index_.depth(a) > index_.depth(b); });
  return members;
}

// Frees a condemned block that nobody holds any more, and the ancestors it kept.
void HostTier::LetGo(SlotId slot) {
  while (slot != kNoSlot && index_.state(slot) == BlockState::kCondemned &&
         index_.children(slot) == 0 && index_.leases(slot) == 0) {
    const SlotId parent = index_.parent(slot);
    if (failed_.erase(slot) > 0) {
      KeepSlot(slot);
    } else {
      FreeSlot(slot);
    }
    slot = parent;
  }
  // A condemned block under a published one (quarantine) held it, too.
  if (slot != kNoSlot && index_.Evictable(slot)) order_->Rest(slot);
}

void HostTier::KeepSlot(SlotId slot) {
  index_.Keep(slot);
  links_.PushBack(&kept_, slot);
  if (kept_.size > keep_) FreeSlot(links_.PopFront(&kept_));  // I7
}

size_t HostTier::Clear() {
  const std::lock_guard lock(mutex_);
  for (SlotId slot = 0; slot < index_.n_slots(); ++slot) {
    const BlockState state = index_.state(slot);
    if (state == BlockState::kPending) {
      links_.Remove(&pending_, slot);
      ++n_orphaned_;
    }
    if (state == BlockState::kPending || state == BlockState::kPublished) {
      gone_.Add(index_.key(slot), MarkOf(Fate::kCleared));
    }
  }
  const size_t n_out = n_published_;
  n_published_ = 0;
  order_->DropAll();
  index_.DetachAll();
  for (SlotId slot = 0; slot < index_.n_slots(); ++slot) LetGo(slot);
  cleared_ += n_out;
  return n_out;
}

// ---------------------------------------------------------------------------------------------
// Looking

bool HostTier::Owns(int32_t slot, uint64_t generation) const {
  return slot >= 0 && static_cast<uint32_t>(slot) < index_.n_slots() &&
         index_.state(static_cast<SlotId>(slot)) != BlockState::kFree &&
         index_.generation(static_cast<SlotId>(slot)) == generation;
}

std::optional<std::pair<int32_t, uint64_t>> HostTier::Find(const Key& key) const {
  const std::lock_guard lock(mutex_);
  const SlotId slot = index_.Find(key);
  if (slot == kNoSlot || index_.state(slot) != BlockState::kPublished) return std::nullopt;
  return std::pair(static_cast<int32_t>(slot), index_.generation(slot));
}

HostTier::Listed HostTier::List(uint32_t first, uint32_t n) const {
  Listed listed;
  const std::lock_guard lock(mutex_);
  const uint64_t stop = std::min<uint64_t>(index_.n_slots(), uint64_t{first} + n);
  for (uint64_t at = first; at < stop; ++at) {
    const auto slot = static_cast<SlotId>(at);
    if (index_.state(slot) == BlockState::kPublished) AddTo(&listed, slot);
  }
  return listed;
}

HostTier::Listed HostTier::Kept() const {
  Listed listed;
  const std::lock_guard lock(mutex_);
  for (const SlotId slot : links_.Members(kept_)) AddTo(&listed, slot);
  for (const SlotId slot : failed_) AddTo(&listed, slot);
  return listed;
}

void HostTier::AddTo(Listed* listed, SlotId slot) const {
  listed->slots.push_back(static_cast<int32_t>(slot));
  listed->generations.push_back(index_.generation(slot));
  const Key key = index_.key(slot);
  const auto* const bytes = reinterpret_cast<const unsigned char*>(&key);
  listed->keys.insert(listed->keys.end(), bytes, bytes + kKeyBytes);
}

std::optional<uint64_t> HostTier::Checksum(int32_t slot, uint64_t generation) const {
  const std::lock_guard lock(mutex_);
  if (!Owns(slot, generation)) return std::nullopt;
  const BlockState state = index_.state(static_cast<SlotId>(slot));
  if (state != BlockState::kPublished && state != BlockState::kCondemned &&
      state != BlockState::kKept) {
    return std::nullopt;
  }
  return index_.checksum(static_cast<SlotId>(slot));
}

uint32_t HostTier::NumFree() const {
  const std::lock_guard lock(mutex_);
  return free_.size;
}

HostTier::Stats HostTier::GetStats() const {
  const std::lock_guard lock(mutex_);
  const uint32_t n = index_.n_slots();
  const uint64_t known = free_.size + pending_.size + n_published_ + n_orphaned_ + kept_.size;
  const size_t block_bytes = index_.bytes() - size_t{n} * kKeyBytes + links_.bytes();
  return Stats{
      .n_slots = n,
      .free = free_.size,
      .pending = pending_.size,
      .published = n_published_,
      .orphaned = n_orphaned_,
      .condemned = n - known,
      .kept = kept_.size,
      .leases = leases_.size(),
      .leased = n_leased_,
      .inserts = inserts_,
      .evictions = evictions_,
      .abandoned = abandoned_,
      .quarantined = quarantined_,
      .cleared = cleared_,
      .index_bytes_per_block = PerBlock(block_bytes + order_->bytes(), n),
      .side_bytes_per_block = PerBlock(gone_.bytes() + order_->ghost_bytes(), n),
  };
}

}  // namespace kvmem
