// An arena in plain memory, without the file. Where the slots fill whole pages (64 of them always
// do), the last one ends against a page that nobody may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "check.h"
#include "copy/slot_table.h"
#include "guarded_bytes.h"
#include "hash/xxh3.h"

namespace kvmem {

class TestArena {
 public:
  TestArena(uint64_t n_slots, uint64_t slot_bytes, uint32_t ranks = 1)
      : TestArena(Header(n_slots, slot_bytes, ranks)) {}

  // The header's checksum made right again after a change of it.
  ArenaHeader* header() { return reinterpret_cast<ArenaHeader*>(base()); }
  void Seal() { header()->checksum = Xxh3_64(header(), offsetof(ArenaHeader, checksum)); }

  std::byte* header_bytes() { return base(); }
  size_t bytes() const { return bytes_; }

  bool Opens(std::string* error, uint32_t rank = 0) {
    return SlotTable::Open(base(), bytes_, rank, error).has_value();
  }
  SlotTable table(uint32_t rank = 0) {
    std::string error;
    const std::optional<SlotTable> table = SlotTable::Open(base(), bytes_, rank, &error);
    CHECK(table.has_value());
    return *table;
  }

 private:
  explicit TestArena(const ArenaHeader& h)
      : bytes_(h.total_bytes), memory_(RoundUp(h.total_bytes, kPage)) {
    std::memcpy(base(), &h, sizeof h);
  }

  static ArenaHeader Header(uint64_t n_slots, uint64_t slot_bytes, uint32_t ranks) {
    ArenaHeader h = {};
    std::memcpy(h.magic, kArenaMagic, sizeof h.magic);
    h.version = kArenaVersion;
    h.byte_order = kArenaByteOrder;
    h.n_slots = n_slots;
    h.slot_bytes = slot_bytes;
    h.slot_stride = RoundUp(slot_bytes, kSlotAlign);
    h.descriptors_offset = kArenaHeaderBytes;
    h.ranks = ranks;
    h.stats_offset = RoundUp(kArenaHeaderBytes + n_slots * ranks * sizeof(SlotDescriptor), 4096);
    h.stats_bytes = 65536;
    h.data_offset = RoundUp(h.stats_offset + h.stats_bytes + kArenaSwitchBytes, kArenaAlign);
    h.total_bytes = h.data_offset + n_slots * ranks * h.slot_stride;
    h.checksum = Xxh3_64(&h, offsetof(ArenaHeader, checksum));
    return h;
  }

  std::byte* base() { return memory_.data(); }

  const size_t bytes_;
  const GuardedBytes memory_;
};

}  // namespace kvmem
