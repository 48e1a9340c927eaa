// What is cached and under which prefix: a forest of blocks, one node a slot, found by key through
// one open-addressing table. It never knows where bytes live.
//
// Thread safety: Match() and StateOf() may run in any number of threads beside one writer; they
// take no lock, write nothing and start over only when a writer has moved an entry meanwhile.
// Everything else REQUIRES the writer's lock (HostTier holds it).
//
// Invariants
//   1. A pending or published block is in the table exactly once; no other block is in it.
//   2. Prefix-closed (I2): a published block's parent is published or it has none; a pending
//      block's parent is pending or published. Depth is the parent's plus one, a root's is 1.
//   3. children(b) counts the pending, published and condemned blocks whose parent is b.
//   4. A reader is told of a block only after comparing all 32 bytes of its key, and only if the
//      block was published, under that key, at an instant inside the call. With 2 at every instant,
//      one positive answer at depth d proves the whole prefix, so a binary search is enough.
//   5. A slot's generation moves on whenever the slot gets a new owner (I3).
//
// Memory a slot, besides the 32-byte key: 32 bytes of node and 1.6 table cells of 8 bytes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "index/key.h"

namespace kvmem {

using SlotId = uint32_t;
inline constexpr SlotId kNoSlot = 0xffffffffu;

enum class BlockState : uint8_t {
  kFree = 0,
  kPending = 1,    // reserved: its bytes are being written; never matched (I4)
  kPublished = 2,  // complete; matched
  kOrphan = 3,     // was pending; can't be published any more; its writer has not
                   // reported yet
  kCondemned = 4,  // was published; out of matching; kept for the leases on it
                   // or below it (I3)
  kKept = 5,       // was condemned; nobody uses it; its bytes are for people to look at
};

inline constexpr uint8_t kTierHost = 1;
inline constexpr uint8_t kTierDisk = 2;
inline constexpr uint8_t kTierFar = 4;  // reserved

class PrefixIndex {
 public:
  // 2^27 slots of 360 KiB are 48 TB.
  static constexpr uint32_t kMaxSlots = 1u << 27;

  // REQUIRES: 1 <= n_slots <= kMaxSlots. Throws std::bad_alloc.
  explicit PrefixIndex(uint32_t n_slots);
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // --- readers, lock-free ---

  // Blocks of the longest published prefix of keys[0, n). keys[0, start) is a hint of what matched
  // before; a stale hint costs time, never truth. REQUIRES: start <= n <= keys.size().
  size_t Match(const KeyList& keys, size_t n, size_t start) const;

  // kPending, kPublished or kFree (not in the table).
  BlockState StateOf(const Key& key) const;

  // --- the writer ---

  // The pending or published block under this key, or kNoSlot.
  SlotId Find(const Key& key) const;

  // Gives a free slot to a new pending block. REQUIRES: the key is not in the table; parent is
  // kNoSlot, pending or published.
  void Add(SlotId slot, const Key& key, SlotId parent);

  // The next block of a free slot gets the generation after this one. REQUIRES: free.
  void SetGeneration(SlotId slot, uint64_t generation);

  // REQUIRES: pending, and its parent published or absent.
  void Publish(SlotId slot, uint64_t checksum, uint8_t tiers);

  // Takes a block out of matching without freeing its slot; a pending one becomes an orphan and
  // leaves its parent, a published one is condemned and stays below its parent. REQUIRES: pending
  // or published; nothing below it is published.
  void Detach(SlotId slot);

  // Frees a slot in any state, out of the table if it is in it. REQUIRES: no children, no leases.
  void Free(SlotId slot);

  // As Free(), but nobody gets the slot: it leaves its parent and keeps its generation and key.
  // REQUIRES: condemned, no children, no leases.
  void Keep(SlotId slot);

  // Takes every block out of matching at one instant and detaches each of them.
  void DetachAll();

  void AddLease(SlotId slot) { ++nodes_[slot].leases; }
  void DropLease(SlotId slot) { --nodes_[slot].leases; }

  uint32_t n_slots() const { return n_slots_; }
  BlockState state(SlotId slot) const;
  uint64_t generation(SlotId slot) const;
  uint8_t tiers(SlotId slot) const;
  Key key(SlotId slot) const;
  SlotId parent(SlotId slot) const { return nodes_[slot].parent; }
  uint32_t depth(SlotId slot) const { return nodes_[slot].depth.load(std::memory_order_relaxed); }
  uint32_t children(SlotId slot) const { return nodes_[slot].children; }
  uint32_t leases(SlotId slot) const { return nodes_[slot].leases; }
  uint64_t checksum(SlotId slot) const { return nodes_[slot].checksum; }

  // May this block be evicted: a published leaf without a lease.
  bool Evictable(SlotId slot) const {
    const Node& node = nodes_[slot];
    return node.children == 0 && node.leases == 0 && state(slot) == BlockState::kPublished;
  }

  // All memory of the index, the 32-byte keys included.
  size_t bytes() const { return n_slots_ * sizeof(Node) + n_cells_ * sizeof(Cell); }

  // Adds one line for every breach of invariants 1 to 3. O(n_slots).
  void Check(std::vector<std::string>* faults) const;

 private:
  friend struct PrefixIndexPeer;  // tests break things through it

  using Cell = std::atomic<uint64_t>;  // 0 is empty, else fingerprint << 32 | slot + 1

  // One cache line. `tag` is generation << 16 | tiers << 8 | epoch parity << 7 | state. Written by
  // the writer only; key, tag and depth are read by readers beside it.
  struct alignas(64) Node {
    std::atomic<uint64_t> key[4];
    std::atomic<uint64_t> tag{0};
    uint64_t checksum = 0;
    SlotId parent = kNoSlot;
    uint32_t children = 0;
    uint32_t leases = 0;
    std::atomic<uint32_t> depth{0};
  };
  static_assert(sizeof(Node) == 64);

  static constexpr uint32_t kAnyDepth = 0;

  // Where a reader may be overtaken by the writer; tests act there, nothing else does.
  enum class Point { kAtCell, kAfterTag, kAfterCell };

  // What a reader is told of a key; with a depth, blocks elsewhere in the forest don't count.
  BlockState Probe(const Key& key, uint32_t depth) const;
  template <typename Overtake>
  BlockState ProbeOvertaken(const Key& key, uint32_t depth, Overtake&& overtake) const;
  template <typename Overtake>
  bool Read(SlotId slot, const Key& key, uint32_t depth, uint64_t epoch, BlockState* state,
            Overtake&& overtake) const;
  void SetState(SlotId slot, BlockState state, uint8_t tiers);
  void Insert(SlotId slot, uint32_t fingerprint);
  void Erase(SlotId slot);
  void CheckTable(std::vector<std::string>* faults) const;
  void CheckForest(std::vector<std::string>* faults) const;
  static uint32_t Fingerprint(const Key& key) { return static_cast<uint32_t>(Mix(key) >> 32); }
  size_t Home(uint32_t fingerprint) const {
    return static_cast<size_t>((uint64_t{fingerprint} * n_cells_) >> 32);
  }
  size_t Next(size_t cell) const { return cell + 1 == n_cells_ ? 0 : cell + 1; }

  // Immutable.
  const uint32_t n_slots_;
  const size_t n_cells_;

  // Written by the writer, read beside it.
  const std::unique_ptr<Node[]> nodes_;
  const std::unique_ptr<Cell[]> cells_;
  std::atomic<uint64_t> epoch_{0};  // its lowest bit marks nodes; moving on empties the index
  std::atomic<uint64_t> moves_{0};  // entries moved to another cell so far
};

}  // namespace kvmem
