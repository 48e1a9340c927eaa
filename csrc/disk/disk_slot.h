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
  std::vector<uint64_t> sums;  // XXH3-64 of each rank's share
};

// Every check of D1 (disk_format.h). `slot` has n_read bytes; `plain` has room for a slot, behind
// its header. *block is filled only with kNone.
SlotFault ReadSlot(const DiskHeader& store, const DiskRecord& wanted, const std::byte* slot,
                   size_t n_read, DiskCodec* codec, std::byte* plain, SlotBlock* block);

}  // namespace kvmem
