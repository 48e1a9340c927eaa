#include "disk/disk_slot.h"

#include <cstring>

#include "hash/xxh3.h"

namespace kvmem {

const char* NameOf(SlotFault fault) {
  switch (fault) {
    case SlotFault::kNone:
      return "";
    case SlotFault::kShort:
      return "short";
    case SlotFault::kHeader:
      return "header";
    case SlotFault::kIdentity:
      return "identity";
    case SlotFault::kBytes:
      return "bytes";
    case SlotFault::kBlock:
      return "block";
    case SlotFault::kUnread:
      return "unread";
  }
  return "header";
}

SlotFault OpenSlot(const DiskHeader& store, const DiskRecord& wanted, const std::byte* slot,
                   size_t n_read, DiskCodec* codec, std::byte* plain, SlotBlock* block) {
  DiskSlotHeader header;
  if (n_read < sizeof header) return SlotFault::kShort;
  std::memcpy(&header, slot, sizeof header);
  if (!IsSound(header)) return SlotFault::kHeader;
  if (header.generation != wanted.generation ||
      std::memcmp(header.key, wanted.key, kKeyBytes) != 0 ||
      std::memcmp(header.name_space, store.name_space, kKeyBytes) != 0 ||
      header.group != wanted.group || header.ranks != store.ranks) {  // I1
    return SlotFault::kIdentity;
  }
  const uint64_t n = uint64_t{header.share_length} * store.ranks;
  if (n == 0 || header.share_length > store.share_bytes || header.stored_length > n ||
      !IsCodec(header.codec) || (header.codec == 0 && header.stored_length != n)) {
    return SlotFault::kHeader;
  }
  if (n_read < sizeof header + header.stored_length) return SlotFault::kShort;
  const std::byte* payload = slot + sizeof header;
  if (header.codec == 0 && store.ranks == 1) {
    // Stored and payload are the same bytes: they are hashed once, as the payload.
    if (header.stored_checksum != header.payload_checksum) return SlotFault::kBlock;
  } else if (Xxh3_64(payload, header.stored_length) != header.stored_checksum) {
    return SlotFault::kBytes;
  }
  if (header.codec != 0) {
    if (NeedsZstd(header.codec) && !DiskCodec::Available()) return SlotFault::kUnread;
    std::byte* const decoded = plain + sizeof header;
    if (!codec->Decode(header.codec, payload, header.stored_length, decoded, n)) {
      return SlotFault::kBlock;
    }
    payload = decoded;
  }
  *block = {payload, header.share_length, header.payload_checksum, {}};
  return SlotFault::kNone;
}

bool IsWhole(const SlotBlock& block) {
  return PayloadChecksum(block.sums.data(), block.sums.size()) == block.payload_checksum;
}

SlotFault ReadSlot(const DiskHeader& store, const DiskRecord& wanted, const std::byte* slot,
                   size_t n_read, DiskCodec* codec, std::byte* plain, SlotBlock* block) {
  const SlotFault fault = OpenSlot(store, wanted, slot, n_read, codec, plain, block);
  if (fault != SlotFault::kNone) return fault;
  for (uint32_t rank = 0; rank < store.ranks; ++rank) {
    block->sums.push_back(
        Xxh3_64(block->payload + uint64_t{rank} * block->share_length, block->share_length));
  }
  if (IsWhole(*block)) return SlotFault::kNone;
  return block->payload == slot + sizeof(DiskSlotHeader) && store.ranks == 1 ? SlotFault::kBytes
                                                                             : SlotFault::kBlock;
}

}  // namespace kvmem
