#include "disk/disk_format.h"

#include <cstring>

#include "hash/xxh3.h"

namespace kvmem {
namespace {

template <typename T>
uint64_t Digest(const T& value) {
  return Xxh3_64(&value, offsetof(T, checksum));
}

}  // namespace

uint64_t DiskSlotBytes(uint64_t share_bytes, uint32_t ranks) {
  const uint64_t bytes = sizeof(DiskSlotHeader) + share_bytes * ranks;
  return (bytes + kDiskAlign - 1) / kDiskAlign * kDiskAlign;
}

uint64_t DiskRecordsWithin(uint64_t disk_bytes, uint64_t slot_bytes) {
  if (disk_bytes < sizeof(DiskHeader)) return 0;
  return (disk_bytes - sizeof(DiskHeader)) / (slot_bytes + sizeof(DiskRecord));
}

void Seal(DiskHeader* header) { header->checksum = Digest(*header); }
void Seal(DiskRecord* record, uint64_t number) { record->checksum = Digest(*record) ^ number; }
void Seal(DiskSlotHeader* header) { header->checksum = Digest(*header); }

bool IsSound(const DiskHeader& header) { return header.checksum == Digest(header); }

bool IsSound(const DiskRecord& record, uint64_t number) {
  return record.generation != 0 && record.generation <= kMaxGeneration &&
         record.checksum == (Digest(record) ^ number) && record.place == number;
}

bool IsSound(const DiskSlotHeader& header) {
  return std::memcmp(header.magic, kDiskSlotMagic, sizeof header.magic) == 0 &&
         header.checksum == Digest(header);
}

uint64_t PayloadChecksum(const uint64_t* shares, size_t n) {
  return n == 1 ? shares[0] : Xxh3_64(shares, n * sizeof *shares);
}

}  // namespace kvmem
