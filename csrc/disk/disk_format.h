// The bytes of a disk store (docs/formats.md, "The disk store").
//
// Thread safety: pure.
//
// Invariants
//   D1  Whatever is on the disk, a check that passes means that the bytes are the ones that were
//       written for that key, generation and namespace: a record's checksum is seeded with its
//       number, a slot's header names its block, and carries the checksum of the bytes as they are
//       stored and of the block that they are decoded to.
//   D2  Numbers are little-endian; a machine of the other order refuses the table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy/slot_table.h"

namespace kvmem {

inline constexpr char kDiskMagic[8] = {'K', 'V', 'M', 'E', 'M', 'D', 'S', 'K'};
inline constexpr char kDiskSlotMagic[8] = {'K', 'V', 'M', 'E', 'M', 'B', 'L', 'K'};
inline constexpr uint32_t kDiskVersion = 2;
inline constexpr uint32_t kDiskByteOrder = 0x01020304;
inline constexpr size_t kDiskAlign = 4096;  // of slots and the table's header, for O_DIRECT

struct DiskHeader {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint64_t n_records;
  uint64_t unit_bytes;   // a slot is a run of units
  uint64_t n_units;      // of data.kvd at most
  uint64_t share_bytes;  // at most, of one rank
  uint32_t ranks;
  uint32_t zero;
  unsigned char name_space[kKeyBytes];
  unsigned char reserved[kDiskAlign - 96];
  uint64_t checksum;  // XXH3-64 of all before it
};
static_assert(sizeof(DiskHeader) == kDiskAlign);

struct DiskRecord {
  unsigned char key[kKeyBytes];
  unsigned char parent[kKeyBytes];  // zeros: the first of its prompt, or a block by itself
  uint64_t generation;              // 0: the record holds nothing
  uint64_t payload_checksum;
  uint64_t published_checksum;  // what the index is given: exclusive or of the shares' XXH3-64
  uint64_t sequence;            // rises with each write
  uint32_t share_length;        // bytes of each rank's share
  uint32_t group;
  uint32_t depth;
  uint32_t codec;          // see disk_codec.h
  uint32_t place;          // the slot's first unit
  uint32_t stored_length;  // bytes that follow the slot's header
  uint64_t checksum;       // XXH3-64 of all before it, exclusive or the record's number
};
static_assert(sizeof(DiskRecord) == 128);

struct DiskSlotHeader {
  char magic[8];
  uint64_t generation;
  unsigned char key[kKeyBytes];
  unsigned char name_space[kKeyBytes];
  uint64_t payload_checksum;
  uint32_t share_length;
  uint32_t group;
  uint32_t codec;
  uint32_t ranks;
  uint64_t stored_checksum;  // XXH3-64 of the bytes that follow
  uint32_t stored_length;
  uint32_t zero;
  uint64_t checksum;  // XXH3-64 of all before it
};
static_assert(sizeof(DiskSlotHeader) == 128);

inline constexpr uint64_t kMostKept = 16;

// How a budget is spent on blocks of `ranks` shares of `share_bytes`.
struct DiskPlan {
  uint64_t unit_bytes;  // a multiple of 4,096
  uint32_t slot_units;  // of a block as it is
  uint64_t n_units;
  uint64_t n_records;  // twice as many as blocks as they are: a codec may halve them
  uint32_t n_kept;     // files of damaged slots that are kept for inspection

  uint64_t slot_bytes() const { return slot_units * unit_bytes; }
};

// All zeros but for the unit and the slot if not one block fits (I7).
DiskPlan PlanDisk(uint64_t disk_bytes, uint64_t share_bytes, uint32_t ranks);

// Bytes of a slot that holds so many, up to a multiple of 4,096.
inline uint64_t DiskSlotBytes(uint64_t stored_length) {
  return (sizeof(DiskSlotHeader) + stored_length + kDiskAlign - 1) / kDiskAlign * kDiskAlign;
}

void Seal(DiskHeader* header);
void Seal(DiskRecord* record, uint64_t number);
void Seal(DiskSlotHeader* header);
bool IsSound(const DiskHeader& header);
bool IsSound(const DiskSlotHeader& header);
// Its checksum holds, and what it says can be in a store of that header.
bool IsSound(const DiskRecord& record, uint64_t number, const DiskHeader& header);

// Units of the record's slot. REQUIRES: the record is sound.
uint32_t UnitsOf(const DiskRecord& record, const DiskHeader& header);

// Of a block's shares, by their own XXH3-64: that of one share, or XXH3-64 of all of them in order.
uint64_t PayloadChecksum(const uint64_t* shares, size_t n);

}  // namespace kvmem
