// One host tier: n_slots slots under one prefix index with one eviction order. It says which slot
// holds which block and who may use it; the bytes are the copier's.
//
// The life of a slot:
//
//           reserve           publish             evicted
//   free ─────────────▶ pending ─────▶ published ─────────▶ free
//                          │               │
//                          ▼ (a)           ▼ (b)
//                        orphan        condemned
//                          │ (c)           │ (d)
//                          ▼               ▼
//                        free            free
//
//   (a) clear, quarantine, or a parent was abandoned
//   (b) clear or quarantine, while the block or one below it is leased; else it is free at once
//   (c) its writer reports: publish or abandon
//   (d) the last lease on it or below it ends. The block that failed its check is then kept, if
//       Create() was told to keep some: condemned ─▶ kept ─▶ free. It goes when a later one needs
//       its place, or when there is no other room for a new block. Those below it are not kept:
//       nothing was wrong with them.
//
// Thread safety: every method may be called from any thread. Match() and Why() take no lock; all
// others take one mutex. No method throws while holding it, except std::bad_alloc before a change.
//
// Invariants (CheckIntegrity() compares every structure with the others)
//   1. I2: prefix-closed at every instant. A pending block is its parent's child, so its parent
//      can't be evicted before it; it is published only below a published parent.
//   2. I3: a slot is free only if nobody can be reading or writing it. A lease on a block holds the
//      block and, since leaves go first, all its ancestors. A reserved slot stays with its writer
//      until exactly one Publish() or Abandon() of it, whatever happens to the block meanwhile.
//   3. I4: only Publish() makes a block match.
//   4. I7: the states of n_slots slots add up to n_slots, and at most `keep` of them are kept.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "index/prefix_index.h"
#include "pool/eviction.h"
#include "pool/ghost.h"
#include "pool/slot_links.h"

namespace kvmem {

enum class Fate { kUnknown, kPending, kPublished, kEvicted, kQuarantined, kCleared, kAbandoned };
enum class LeaseResult { kOk, kUnknownLease, kNotBelow };
enum class ReserveResult { kOk, kNoParent, kNoRoom };

class HostTier {
 public:
  // Blocks [start, n) of a prompt, and the lease that keeps blocks [0, n) where they are.
  struct Acquired {
    uint64_t lease = 0;  // 0: there is nothing at or beyond start, so nothing is leased
    size_t n = 0;
    std::vector<int32_t> slots;
    std::vector<uint64_t> generations;
  };

  // Slots for the blocks of a prompt that were not here: block index[j] goes to slots[j].
  struct Reserved {
    ReserveResult result = ReserveResult::kOk;
    std::vector<int32_t> index;
    std::vector<int32_t> slots;
    std::vector<uint64_t> generations;
  };

  struct Stats {
    uint64_t n_slots, free, pending, published, orphaned, condemned, kept;
    uint64_t leases,
        leased;  // leases alive, and blocks that at least one of them names
    uint64_t inserts, evictions, abandoned, quarantined, cleared;
    uint64_t index_bytes_per_block;  // per slot, without the 32-byte key, rounded up
    uint64_t side_bytes_per_block;   // of the tables that remember blocks gone
  };

  // nullptr if the order is unknown. `keep`: how many blocks that failed a check stay where they
  // are for people to look at. REQUIRES: 1 <= n_slots <= PrefixIndex::kMaxSlots.
  static std::unique_ptr<HostTier> Create(uint32_t n_slots, std::string_view order,
                                          uint32_t keep = 0);

  // Blocks of the longest published prefix; see PrefixIndex::Match. It is no use of the blocks and
  // promises nothing beyond the call: Acquire() does both.
  size_t Match(const KeyList& keys, size_t start) const {
    return index_.Match(keys, keys.size(), start);
  }

  // What became of the block with this key. The memory of blocks gone is bounded (1.5 * n_slots
  // keys, oldest first out), so kUnknown may also mean long ago.
  Fate Why(const Key& key) const;

  // Leases the longest published prefix of keys[0, limit). n may be less than start. Keys that are
  // no chain of this index get n = 0. Without `use` it is no use of the blocks: a writer that holds
  // what it has just stored, or a request that asks again, tells the order nothing new. REQUIRES:
  // start <= keys.size().
  Acquired Acquire(const KeyList& keys, size_t start, size_t limit, bool use = true);

  // Moves a lease to the deepest published block of keys[0, n), never up. A lease whose block has
  // been condemned stays where it is. kNotBelow: the leased block is not among these keys.
  LeaseResult Extend(uint64_t lease, const KeyList& keys, size_t n);

  bool Release(uint64_t lease);

  // Blocks of an earlier run, as their store found them. REQUIRES: arrays of n, keys and parents of
  // 32 bytes each; zeros for a parent say that there is none.
  struct Recovered {
    size_t n = 0;
    const int32_t* slots = nullptr;
    const uint64_t* generations = nullptr;
    const uint64_t* checksums = nullptr;
    const unsigned char* keys = nullptr;
    const unsigned char* parents = nullptr;
  };

  // Publishes what an earlier run had, in their slots and generations. Returns which could not be:
  // their parent is not among them (I2), or slot or key is another's. REQUIRES: nothing was
  // reserved yet. O(n), and fastest where parents come before their children.
  std::vector<size_t> Restore(const Recovered& blocks);

  // Takes slots for the blocks of [start, stop) that are not here, evicting if it must. REQUIRES:
  // start <= stop <= keys.size().
  Reserved Reserve(const KeyList& keys, size_t start, size_t stop);

  // Evicts up to n blocks, as Reserve() does where it must, and says whose slots they were: for a
  // tier whose room is not told by its slots alone.
  std::vector<int32_t> Evict(size_t n);

  // Evicts up to n blocks from the end of a piece of a prompt: `keys` are blocks that lie one below
  // the other. The deepest of them that is here goes first, and only leaves that nobody leases go
  // (I2, I3). For whoever knows better than the order what to keep.
  struct Tail {
    size_t present = 0;  // of the keys, before
    std::vector<int32_t> slots;
  };
  Tail Cut(const KeyList& keys, size_t n);

  // The keys of the blocks that were evicted since this was asked last, 32 bytes each; of very many
  // the first kMostTold, so that nobody has to ask.
  std::vector<unsigned char> TakeEvicted();

  // The bytes in these slots are complete. In the order given: publishes what is still pending
  // under that generation and below a published parent; what is not goes back. Returns how many
  // were published. REQUIRES: three arrays of n.
  size_t Publish(const int32_t* slots, const uint64_t* generations, const uint64_t* checksums,
                 size_t n);

  // The writer gives these slots up. Pending blocks below them become orphans: their writers have
  // yet to report. Returns how many slots were freed.
  size_t Abandon(const int32_t* slots, const uint64_t* generations, size_t n);

  // Takes a block and all below it out of matching for good (I5); the same keys may be stored anew
  // in other slots. Returns how many blocks; 0 if the slot has another owner by now. O(n_slots),
  // O(1) for a leaf.
  size_t Quarantine(int32_t slot, uint64_t generation);

  // Takes every block out of matching at one instant. Returns how many were published. O(n_slots).
  size_t Clear();

  // Published blocks in slots [first, first + n), for whoever looks at their bytes; they may move
  // on at any time. 32 bytes a key.
  struct Listed {
    std::vector<int32_t> slots;
    std::vector<uint64_t> generations;
    std::vector<unsigned char> keys;
  };
  Listed List(uint32_t first, uint32_t n) const;

  // Blocks that failed a check and whose bytes are still where they were: those that are kept,
  // oldest first, then those that leases hold.
  Listed Kept() const;

  // Where the published block with this key is, and its generation.
  std::optional<std::pair<int32_t, uint64_t>> Find(const Key& key) const;

  // Of a published, condemned or kept block.
  std::optional<uint64_t> Checksum(int32_t slot, uint64_t generation) const;

  Stats GetStats() const;

  // Slots that can be reserved without evicting anything.
  uint32_t NumFree() const;
  std::vector<std::string> CheckIntegrity() const;

 private:
  friend struct HostTierPeer;  // tests break things through it

  HostTier(uint32_t n_slots, std::string_view order, uint32_t keep);

  // All below REQUIRE mutex_.
  bool Owns(int32_t slot, uint64_t generation) const;
  SlotId TakeSlot(SlotId parent);
  void EvictSlot(SlotId slot);
  void FreeSlot(SlotId slot);
  void KeepSlot(SlotId slot);
  void AddTo(Listed* listed, SlotId slot) const;
  void LetGo(SlotId slot);
  void AbandonSlot(SlotId slot);
  void OrphanBelow(SlotId slot);
  void Orphan(SlotId slot);
  void DropLease(SlotId slot);
  std::vector<SlotId> Subtree(SlotId root) const;
  bool RestoreOne(const Recovered& blocks, size_t i, bool* orphan);
  void RestoreEarly(const Recovered& blocks, const std::vector<size_t>& early,
                    std::vector<size_t>* gone);
  void CheckSlots(std::vector<std::string>* faults) const;
  void CheckLeases(std::vector<std::string>* faults) const;

  static constexpr size_t kMostTold = 4096;

  const uint32_t keep_;

  mutable std::mutex mutex_;

  // Read without the mutex by Match() and Why(), written under it.
  PrefixIndex index_;
  Ghost gone_;  // marks are Fates

  // Guarded by mutex_.
  SlotLinks links_;
  SlotLinks::List free_;
  SlotLinks::List pending_;            // parents before children
  SlotLinks::List kept_;               // oldest first
  std::unordered_set<SlotId> failed_;  // condemned blocks that will be kept
  std::unique_ptr<EvictionOrder> order_;
  std::unordered_map<uint64_t, SlotId> leases_;
  std::vector<unsigned char> evicted_;  // keys of 32 bytes, not told yet
  uint64_t next_lease_ = 1;
  uint64_t n_published_ = 0;
  uint64_t n_orphaned_ = 0;
  uint64_t n_leased_ = 0;
  uint64_t inserts_ = 0;
  uint64_t evictions_ = 0;
  uint64_t abandoned_ = 0;
  uint64_t quarantined_ = 0;
  uint64_t cleared_ = 0;
};

}  // namespace kvmem
