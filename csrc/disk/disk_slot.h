// From the bytes that stand in a slot to the block that they should be, or why they are not.
//
// Thread safety: none beyond its arguments'.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "disk/disk_codec.h"
#include "disk/disk_format.h"

namespace kvmem {

enum class SlotFault : uint8_t {
  kNone,
  kShort,     // the file ends before it
  kHeader,    // no slot's header, or a damaged one
  kIdentity,  // another block's
  kBytes,     // the stored bytes are damaged
  kBlock,     // they are whole, and decode to something else
  kUnread,    // by a codec that this machine can't decode
};
const char* NameOf(SlotFault fault);

struct SlotBlock {
  const std::byte* payload;  // share_length bytes of each rank, in `slot` or in `plain`
  uint32_t share_length;
  uint64_t payload_checksum;   // that the ranks' sums must come to
  std::vector<uint64_t> sums;  // XXH3-64 of each rank's share
};

// The checks of D1 (disk_format.h) but for the last, that of the payload, which is hashed where it
// goes: IsWhole(). `slot` has n_read bytes; `plain` has room for a slot, behind its header. *block
// is filled only with kNone, its sums are not.
SlotFault OpenSlot(const DiskHeader& store, const DiskRecord& wanted, const std::byte* slot,
                   size_t n_read, DiskCodec* codec, std::byte* plain, SlotBlock* block);
// Whether the sums, of every rank, are those of the block that was stored.
bool IsWhole(const SlotBlock& block);

// Every check of D1; *block with its sums.
SlotFault ReadSlot(const DiskHeader& store, const DiskRecord& wanted, const std::byte* slot,
                   size_t n_read, DiskCodec* codec, std::byte* plain, SlotBlock* block);

}  // namespace kvmem
