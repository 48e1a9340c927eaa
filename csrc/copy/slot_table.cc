#include "copy/slot_table.h"

#include "hash/xxh3.h"

namespace kvmem {
namespace {

uint64_t Stamp(uint64_t generation, SlotState state) {
  return generation * 4 + static_cast<uint64_t>(state);
}

bool Same(const std::atomic<uint64_t> (&words)[4], const std::byte* bytes) {
  uint64_t wanted[4];
  std::memcpy(wanted, bytes, sizeof wanted);
  for (int i = 0; i < 4; ++i) {
    if (words[i].load(std::memory_order_relaxed) != wanted[i]) return false;
  }
  return true;
}

void Put(std::atomic<uint64_t> (&words)[4], const void* bytes) {
  uint64_t value[4];
  std::memcpy(value, bytes, sizeof value);
  for (int i = 0; i < 4; ++i) words[i].store(value[i], std::memory_order_relaxed);
}

// Where the parts of an arena of this size must be; false on any overflow.
bool GeometryHolds(const ArenaHeader& h) {
  if (h.n_slots == 0 || h.n_slots > INT32_MAX || h.slot_bytes == 0) return false;
  if (h.ranks == 0 || h.ranks > kMaxRanks) return false;
  if (h.slot_bytes > (uint64_t{1} << 46)) return false;
  if (h.slot_stride != (h.slot_bytes + kSlotAlign - 1) / kSlotAlign * kSlotAlign) return false;
  if (h.descriptors_offset != kArenaHeaderBytes) return false;
  const uint64_t n_shares = h.n_slots * h.ranks;
  const uint64_t descriptors_end = h.descriptors_offset + n_shares * sizeof(SlotDescriptor);
  if (h.stats_offset < descriptors_end || h.stats_offset % 4096 != 0) return false;
  if (h.data_offset % kArenaAlign != 0 || h.data_offset > h.total_bytes) return false;
  if (h.stats_offset > h.data_offset) return false;
  const uint64_t between = h.data_offset - h.stats_offset;  // the stats, the switch, a gap
  if (between < kArenaSwitchBytes || h.stats_bytes > between - kArenaSwitchBytes) return false;
  uint64_t data_bytes;
  if (__builtin_mul_overflow(n_shares, h.slot_stride, &data_bytes)) return false;
  return h.total_bytes - h.data_offset == data_bytes;
}

}  // namespace

std::optional<SlotTable> SlotTable::Open(std::byte* base, size_t bytes, uint32_t rank,
                                         std::string* error) {
  if (bytes < kArenaHeaderBytes || reinterpret_cast<uintptr_t>(base) % 4096 != 0) {
    *error = "the buffer is no mapped arena: it is too small or not page-aligned";
    return std::nullopt;
  }
  ArenaHeader h;
  std::memcpy(&h, base, sizeof h);
  if (std::memcmp(h.magic, kArenaMagic, sizeof kArenaMagic) != 0) {
    *error = "the buffer is no kvmem arena: its magic differs";
  } else if (h.byte_order != kArenaByteOrder) {
    *error = "the arena was made on a machine of the other byte order";
  } else if (h.version != kArenaVersion) {
    *error = "the arena has version " + std::to_string(h.version) + "; this kvmem reads version " +
             std::to_string(kArenaVersion);
  } else if (h.checksum != Xxh3_64(&h, offsetof(ArenaHeader, checksum))) {
    *error = "the arena's header is damaged: its checksum differs";
  } else if (h.total_bytes != bytes || !GeometryHolds(h)) {
    *error = "the arena's geometry does not fit its " + std::to_string(bytes) + " bytes";
  } else if (rank >= h.ranks) {
    *error =
        "the arena has " + std::to_string(h.ranks) + " ranks and no rank " + std::to_string(rank);
  } else {
    SlotTable table;
    table.descriptors_ = reinterpret_cast<SlotDescriptor*>(base + h.descriptors_offset) + rank;
    table.data_ = base + h.data_offset + rank * h.slot_stride;
    table.n_slots_ = h.n_slots;
    table.slot_bytes_ = h.slot_bytes;
    table.slot_stride_ = h.slot_stride;
    table.ranks_ = h.ranks;
    std::memcpy(table.name_space_, h.name_space, sizeof table.name_space_);
    return table;
  }
  return std::nullopt;
}

bool SlotTable::Claim(uint64_t slot, uint64_t generation) const {
  if (generation > kMaxGeneration) return false;
  std::atomic<uint64_t>& stamp = Descriptor(slot).stamp;
  uint64_t now = stamp.load(std::memory_order_relaxed);
  while (now / 4 < generation) {
    // A1: of several that want the slot, one moves its generation.
    if (stamp.compare_exchange_weak(now, Stamp(generation, SlotState::kWriting),
                                    std::memory_order_acq_rel, std::memory_order_relaxed)) {
      return true;
    }
  }
  return false;
}

bool SlotTable::Complete(uint64_t slot, uint64_t generation, const Identity& identity,
                         uint64_t checksum) const {
  SlotDescriptor& d = Descriptor(slot);
  if (d.stamp.load(std::memory_order_acquire) != Stamp(generation, SlotState::kWriting))
    return false;
  d.group.store(identity.group, std::memory_order_relaxed);
  d.length.store(identity.length, std::memory_order_relaxed);
  d.checksum.store(checksum, std::memory_order_relaxed);
  Put(d.key, identity.key);
  Put(d.name_space, name_space_);
  uint64_t writing = Stamp(generation, SlotState::kWriting);
  return d.stamp.compare_exchange_strong(writing, Stamp(generation, SlotState::kComplete),
                                         std::memory_order_release, std::memory_order_relaxed);
}

bool SlotTable::IsComplete(uint64_t slot, uint64_t generation) const {
  return generation <= kMaxGeneration && Descriptor(slot).stamp.load(std::memory_order_acquire) ==
                                             Stamp(generation, SlotState::kComplete);
}

uint64_t SlotTable::Generation(uint64_t slot) const {
  return Descriptor(slot).stamp.load(std::memory_order_acquire) / 4;
}

bool SlotTable::HasIdentity(uint64_t slot, const Identity& identity) const {
  const SlotDescriptor& d = Descriptor(slot);
  return d.group.load(std::memory_order_relaxed) == identity.group &&
         d.length.load(std::memory_order_relaxed) == identity.length && Same(d.key, identity.key) &&
         Same(d.name_space, reinterpret_cast<const std::byte*>(name_space_));
}

}  // namespace kvmem
