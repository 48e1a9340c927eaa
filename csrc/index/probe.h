// How a reader asks for one key beside the writer. Private to the index; a header of its own so
// that tests can overtake a reader at each point where the writer might.
//
// Thread safety: any number of readers beside one writer.
#pragma once

#include "index/prefix_index.h"

namespace kvmem {

// A node's tag: generation (48 bits) | tiers (8) | epoch parity (1) | state (7).
namespace tag {
inline constexpr int kGenerationShift = 16;
inline constexpr int kTiersShift = 8;
inline constexpr int kParityShift = 7;
inline constexpr uint64_t kStateMask = 0x7f;
inline BlockState State(uint64_t tag) { return static_cast<BlockState>(tag & kStateMask); }
}  // namespace tag

template <typename Overtake>
BlockState PrefixIndex::ProbeOvertaken(const Key& key, uint32_t depth, Overtake&& overtake) const {
  const uint32_t fingerprint = Fingerprint(key);
  for (;;) {
    // Acquire: a walk that begins after a move finds the entry in its new cell.
    const uint64_t moves = moves_.load(std::memory_order_acquire);
    const uint64_t epoch = epoch_.load(std::memory_order_acquire);
    for (size_t cell = Home(fingerprint);; cell = Next(cell)) {
      const uint64_t entry = cells_[cell].load(std::memory_order_acquire);
      if (entry == 0) break;
      overtake(Point::kAtCell);
      if (static_cast<uint32_t>(entry >> 32) == fingerprint) {
        BlockState state;
        const SlotId slot = static_cast<SlotId>(entry) - 1;
        if (Read(slot, key, depth, epoch, &state, overtake)) return state;
      }
      overtake(Point::kAfterCell);
    }
    // A miss stands unless an entry was moved from ahead of the walk to behind it. Erase() copies
    // an entry, counts the move, and only then overwrites the old cell: whoever saw that has seen
    // the count. A writer that stands still in between holds nobody up.
    if (moves_.load(std::memory_order_relaxed) == moves) return BlockState::kFree;
  }
}

// True if the slot held this key, in the table and of this epoch, at one instant.
template <typename Overtake>
bool PrefixIndex::Read(SlotId slot, const Key& key, uint32_t depth, uint64_t epoch,
                       BlockState* state, Overtake&& overtake) const {
  const Node& node = nodes_[slot];
  const uint64_t before = node.tag.load(std::memory_order_acquire);
  overtake(Point::kAfterTag);
  *state = tag::State(before);
  if (*state != BlockState::kPending && *state != BlockState::kPublished) return false;
  if (((before >> tag::kParityShift) & 1) != (epoch & 1)) return false;
  if (*state == BlockState::kPublished && !((before >> tag::kTiersShift) & kTierHost)) return false;
  for (int i = 0; i < 4; ++i) {
    if (node.key[i].load(std::memory_order_acquire) != key.word[i]) return false;
  }
  if (depth != kAnyDepth && node.depth.load(std::memory_order_acquire) != depth) return false;
  // I1: a new owner writes its tag before its key, so a key mixed of two owners shows here.
  return node.tag.load(std::memory_order_relaxed) == before;
}

}  // namespace kvmem
