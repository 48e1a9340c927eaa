// An arena in plain memory, without the file.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "check.h"
#include "copy/slot_table.h"
#include "hash/xxh3.h"

namespace kvmem {

inline constexpr uint64_t RoundUp(uint64_t value, uint64_t to) {
  return (value + to - 1) / to * to;
}

class TestArena {
 public:
  TestArena(uint64_t n_slots, uint64_t slot_bytes) {
    ArenaHeader h = {};
    std::memcpy(h.magic, kArenaMagic, sizeof h.magic);
    h.version = kArenaVersion;
    h.byte_order = kArenaByteOrder;
    h.n_slots = n_slots;
    h.slot_bytes = slot_bytes;
    h.slot_stride = RoundUp(slot_bytes, kSlotAlign);
    h.descriptors_offset = kArenaHeaderBytes;
    h.stats_offset = RoundUp(kArenaHeaderBytes + n_slots * sizeof(SlotDescriptor), 4096);
    h.stats_bytes = 65536;
    h.data_offset = RoundUp(h.stats_offset + h.stats_bytes, kArenaAlign);
    h.total_bytes = h.data_offset + n_slots * h.slot_stride;
    h.checksum = Xxh3_64(&h, offsetof(ArenaHeader, checksum));
    bytes_ = h.total_bytes;
    void* const mapped =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mapped != MAP_FAILED);
    base_ = static_cast<std::byte*>(mapped);
    std::memcpy(base_, &h, sizeof h);
  }
  ~TestArena() { munmap(base_, bytes_); }
  TestArena(const TestArena&) = delete;
  TestArena& operator=(const TestArena&) = delete;

  // The header's checksum made right again after a change of it.
  ArenaHeader* header() { return reinterpret_cast<ArenaHeader*>(base_); }
  void Seal() { header()->checksum = Xxh3_64(header(), offsetof(ArenaHeader, checksum)); }

  bool Opens(std::string* error) { return SlotTable::Open(base_, bytes_, error).has_value(); }
  SlotTable table() {
    std::string error;
    const std::optional<SlotTable> table = SlotTable::Open(base_, bytes_, &error);
    CHECK(table.has_value());
    return *table;
  }

 private:
  std::byte* base_;
  size_t bytes_;
};

}  // namespace kvmem
