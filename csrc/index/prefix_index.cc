#include "index/prefix_index.h"

#include "index/probe.h"

namespace kvmem {
namespace {

// 1.6 cells a slot: a load of 0.625 when full, where a miss looks at 4 cells of 8 bytes on average.
size_t CellsFor(uint32_t n_slots) { return size_t{n_slots} + size_t{n_slots} * 3 / 5 + 2; }

}  // namespace

PrefixIndex::PrefixIndex(uint32_t n_slots)
    : n_slots_(n_slots),
      n_cells_(CellsFor(n_slots)),
      nodes_(std::make_unique<Node[]>(n_slots)),
      cells_(std::make_unique<Cell[]>(n_cells_)) {}

// ---------------------------------------------------------------------------------------------
// Readers

size_t PrefixIndex::Match(const KeyList& keys, size_t n, size_t start) const {
  const auto has = [&](size_t i) {
    return Probe(keys.At(i), static_cast<uint32_t>(i + 1)) == BlockState::kPublished;
  };
  size_t low = 0;   // keys[0, low) were seen published
  size_t high = n;  // keys[high] was seen missing, or high == n
  if (start > 0) {
    if (has(start - 1)) {
      low = start;
    } else {
      high = start - 1;
    }
  }
  // The two commonest answers cost one look each: nothing more, and all of it.
  if (low == high || !has(low)) return low;
  ++low;
  if (low == high || has(high - 1)) return high;
  --high;
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    if (has(middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

BlockState PrefixIndex::StateOf(const Key& key) const { return Probe(key, kAnyDepth); }

BlockState PrefixIndex::Probe(const Key& key, uint32_t depth) const {
  return ProbeOvertaken(key, depth, [](Point) {});
}

// ---------------------------------------------------------------------------------------------
// The writer

SlotId PrefixIndex::Find(const Key& wanted) const {
  const uint32_t fingerprint = Fingerprint(wanted);
  for (size_t cell = Home(fingerprint);; cell = Next(cell)) {
    const uint64_t entry = cells_[cell].load(std::memory_order_relaxed);
    if (entry == 0) return kNoSlot;
    const SlotId slot = static_cast<SlotId>(entry) - 1;
    if (static_cast<uint32_t>(entry >> 32) == fingerprint && key(slot) == wanted) return slot;
  }
}

void PrefixIndex::Add(SlotId slot, const Key& key, SlotId parent) {
  Node& node = nodes_[slot];
  const uint64_t generation = this->generation(slot) + 1;
  const uint32_t depth = parent == kNoSlot ? 1 : this->depth(parent) + 1;
  // The generation first, then key and depth with release: see Read().
  node.tag.store(generation << tag::kGenerationShift, std::memory_order_relaxed);
  for (int i = 0; i < 4; ++i) node.key[i].store(key.word[i], std::memory_order_release);
  node.depth.store(depth, std::memory_order_release);
  node.checksum = 0;
  node.parent = parent;
  if (parent != kNoSlot) ++nodes_[parent].children;
  SetState(slot, BlockState::kPending, 0);
  Insert(slot, Fingerprint(key));
}

void PrefixIndex::SetGeneration(SlotId slot, uint64_t generation) {
  nodes_[slot].tag.store(
      generation << tag::kGenerationShift | static_cast<uint64_t>(BlockState::kFree),
      std::memory_order_relaxed);
}

void PrefixIndex::Publish(SlotId slot, uint64_t checksum, uint8_t tiers) {
  nodes_[slot].checksum = checksum;
  SetState(slot, BlockState::kPublished, tiers);
}

void PrefixIndex::Detach(SlotId slot) {
  Node& node = nodes_[slot];
  if (state(slot) == BlockState::kPublished) {
    SetState(slot, BlockState::kCondemned, 0);
  } else {
    SetState(slot, BlockState::kOrphan, 0);
    if (node.parent != kNoSlot) --nodes_[node.parent].children;
    node.parent = kNoSlot;
  }
  Erase(slot);
}

void PrefixIndex::Free(SlotId slot) {
  Node& node = nodes_[slot];
  const BlockState before = state(slot);
  if (node.parent != kNoSlot) --nodes_[node.parent].children;
  node.parent = kNoSlot;
  SetState(slot, BlockState::kFree, 0);
  if (before == BlockState::kPending || before == BlockState::kPublished) Erase(slot);
}

void PrefixIndex::Keep(SlotId slot) {
  Node& node = nodes_[slot];
  if (node.parent != kNoSlot) --nodes_[node.parent].children;
  node.parent = kNoSlot;
  SetState(slot, BlockState::kKept, 0);
}

void PrefixIndex::DetachAll() {
  // One store empties the index for every reader; the rest is tidying that none of them can see.
  epoch_.fetch_add(1, std::memory_order_release);
  for (size_t cell = 0; cell < n_cells_; ++cell) cells_[cell].store(0, std::memory_order_release);
  for (SlotId slot = 0; slot < n_slots_; ++slot) {
    Node& node = nodes_[slot];
    if (state(slot) == BlockState::kPublished) {
      SetState(slot, BlockState::kCondemned, 0);
    } else if (state(slot) == BlockState::kPending) {
      SetState(slot, BlockState::kOrphan, 0);
      if (node.parent != kNoSlot) --nodes_[node.parent].children;
      node.parent = kNoSlot;
    }
  }
}

void PrefixIndex::SetState(SlotId slot, BlockState state, uint8_t tiers) {
  const uint64_t parity = epoch_.load(std::memory_order_relaxed) & 1;
  nodes_[slot].tag.store(generation(slot) << tag::kGenerationShift |
                             uint64_t{tiers} << tag::kTiersShift | parity << tag::kParityShift |
                             static_cast<uint64_t>(state),
                         std::memory_order_release);
}

void PrefixIndex::Insert(SlotId slot, uint32_t fingerprint) {
  size_t cell = Home(fingerprint);
  while (cells_[cell].load(std::memory_order_relaxed) != 0) cell = Next(cell);
  cells_[cell].store(uint64_t{fingerprint} << 32 | (uint64_t{slot} + 1), std::memory_order_release);
}

// Closes the gap by moving entries back (no tombstones: probes stay short however long it runs).
void PrefixIndex::Erase(SlotId slot) {
  size_t hole = Home(Fingerprint(key(slot)));
  while (static_cast<uint32_t>(cells_[hole].load(std::memory_order_relaxed)) != slot + 1) {
    hole = Next(hole);
  }
  for (size_t cell = Next(hole);; cell = Next(cell)) {
    const uint64_t entry = cells_[cell].load(std::memory_order_relaxed);
    if (entry == 0) break;
    // It stays if its home lies in (hole, cell], going round the end.
    const size_t home = Home(static_cast<uint32_t>(entry >> 32));
    const size_t from_home = cell >= home ? cell - home : cell + n_cells_ - home;
    const size_t from_hole = cell >= hole ? cell - hole : cell + n_cells_ - hole;
    if (from_home < from_hole) continue;
    cells_[hole].store(entry, std::memory_order_release);
    moves_.fetch_add(1, std::memory_order_release);
    hole = cell;
  }
  cells_[hole].store(0, std::memory_order_release);
}

BlockState PrefixIndex::state(SlotId slot) const {
  return tag::State(nodes_[slot].tag.load(std::memory_order_relaxed));
}

uint64_t PrefixIndex::generation(SlotId slot) const {
  return nodes_[slot].tag.load(std::memory_order_relaxed) >> tag::kGenerationShift;
}

uint8_t PrefixIndex::tiers(SlotId slot) const {
  return static_cast<uint8_t>(nodes_[slot].tag.load(std::memory_order_relaxed) >> tag::kTiersShift);
}

Key PrefixIndex::key(SlotId slot) const {
  Key key;
  for (int i = 0; i < 4; ++i) {
    key.word[i] = nodes_[slot].key[i].load(std::memory_order_relaxed);
  }
  return key;
}

}  // namespace kvmem
