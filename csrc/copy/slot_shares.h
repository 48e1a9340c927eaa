// A whole block out of a slot or into one, all ranks' shares side by side: for tiers that carry
// blocks in memory of their own.
//
// Thread safety: any thread, beside writers and readers of the same slots (slot_table.h, A1 to A3).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "copy/copy_request.h"
#include "copy/slot_table.h"

namespace kvmem {

// Copies the block's shares to `out`, of `room` bytes, and their XXH3-64 to sums, one a table.
// kChecksum: they are not the ones that were stored. On any but kOk `out` is undefined.
// REQUIRES: slot < n_slots(); `tables` are all ranks of one arena.
CopyStatus TakeShares(const std::vector<SlotTable>& tables, uint64_t slot, uint64_t generation,
                      uint32_t group, const std::byte* key, std::byte* out, uint64_t room,
                      uint64_t* length, uint64_t* sums);

// Claims the slot, copies shares of `length` bytes each into it, and completes it where every
// share's XXH3-64 is its sum (I5): what is there by then is complete, or never was (I4).
// REQUIRES: as above; `from` has tables.size() * length bytes.
CopyStatus PutShares(const std::vector<SlotTable>& tables, uint64_t slot, uint64_t generation,
                     const Identity& identity, const std::byte* from, const uint64_t* sums);

}  // namespace kvmem
