#include "disk/disk_format.h"

#include <algorithm>
#include <cstring>

#include "disk/disk_codec.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

constexpr uint64_t kFewestParts = 8, kMostParts = 32;
constexpr uint64_t kKeptShare = 64;  // one for so many blocks

template <typename T>
uint64_t Digest(const T& value) {
  return Xxh3_64(&value, offsetof(T, checksum));
}

// Parts of a slot as it is, such that little is lost in its last one and, on average, in that of a
// slot that a codec made shorter; more parts than that make holes that nothing fits into.
uint64_t UnitPages(uint64_t slot_pages) {
  if (slot_pages <= kMostParts) return 1;
  uint64_t best = 0, least = UINT64_MAX;
  for (uint64_t parts = kFewestParts; parts <= kMostParts; ++parts) {
    const uint64_t unit = (slot_pages + parts - 1) / parts;
    const uint64_t used = (slot_pages + unit - 1) / unit * unit;
    const uint64_t lost = 2 * (used - slot_pages) + unit;
    if (lost < least) best = unit, least = lost;
  }
  return best;
}

}  // namespace

DiskPlan PlanDisk(uint64_t disk_bytes, uint64_t share_bytes, uint32_t ranks) {
  const uint64_t slot_pages = DiskSlotBytes(share_bytes * ranks) / kDiskAlign;
  const uint64_t unit_pages = UnitPages(slot_pages);
  DiskPlan plan = {};
  plan.unit_bytes = unit_pages * kDiskAlign;
  plan.slot_units = static_cast<uint32_t>((slot_pages + unit_pages - 1) / unit_pages);
  const uint64_t each = plan.slot_bytes() + 2 * sizeof(DiskRecord);
  if (disk_bytes < sizeof(DiskHeader) + each) return plan;
  uint64_t n_blocks = (disk_bytes - sizeof(DiskHeader)) / each;
  plan.n_kept = static_cast<uint32_t>(std::min(n_blocks / kKeptShare, kMostKept));
  n_blocks -= plan.n_kept;  // a kept file is no longer than a slot and its records
  n_blocks = std::min<uint64_t>(n_blocks, INT32_MAX / 2);
  n_blocks = std::min<uint64_t>(n_blocks, UINT32_MAX / plan.slot_units);
  plan.n_units = n_blocks * plan.slot_units;
  plan.n_records = 2 * n_blocks;
  return plan;
}

void Seal(DiskHeader* header) { header->checksum = Digest(*header); }
void Seal(DiskRecord* record, uint64_t number) { record->checksum = Digest(*record) ^ number; }
void Seal(DiskSlotHeader* header) { header->checksum = Digest(*header); }

bool IsSound(const DiskHeader& header) { return header.checksum == Digest(header); }

bool IsSound(const DiskSlotHeader& header) {
  return std::memcmp(header.magic, kDiskSlotMagic, sizeof header.magic) == 0 &&
         header.checksum == Digest(header);
}

bool IsSound(const DiskRecord& record, uint64_t number, const DiskHeader& header) {
  return record.generation != 0 && record.generation <= kMaxGeneration &&
         record.checksum == (Digest(record) ^ number) && record.share_length != 0 &&
         record.share_length <= header.share_bytes && IsCodec(record.codec) &&
         record.stored_length <= uint64_t{record.share_length} * header.ranks &&
         uint64_t{record.place} + UnitsOf(record, header) <= header.n_units;
}

uint32_t UnitsOf(const DiskRecord& record, const DiskHeader& header) {
  const uint64_t bytes = DiskSlotBytes(record.stored_length);
  return static_cast<uint32_t>((bytes + header.unit_bytes - 1) / header.unit_bytes);
}

uint64_t PayloadChecksum(const uint64_t* shares, size_t n) {
  return n == 1 ? shares[0] : Xxh3_64(shares, n * sizeof *shares);
}

}  // namespace kvmem
