// A whole block in a slot, all ranks' shares, as tiers see it that carry blocks by a program's own
// means: what it is, and how it gets in.
//
// Thread safety: any thread, beside writers and readers of the same slots (slot_table.h, A1 to A3).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "copy/copy_request.h"
#include "copy/slot_table.h"

namespace kvmem {

// What a slot says of the block in it: bytes of a share, and the XXH3-64 of each to sums, one a
// table. Whoever reads the bytes asks again after it (A2), and who receives them compares (I5).
// REQUIRES: slot < n_slots(); `tables` are all ranks of one arena.
CopyStatus LookAtShares(const std::vector<SlotTable>& tables, uint64_t slot, uint64_t generation,
                        uint32_t group, const std::byte* key, uint64_t* length, uint64_t* sums);

// Claims the slot, copies shares of `length` bytes each into it, and completes it where every
// share's XXH3-64 is its sum (I5): what is there by then is complete, or never was (I4).
// REQUIRES: as above; `from` has tables.size() * length bytes.
CopyStatus PutShares(const std::vector<SlotTable>& tables, uint64_t slot, uint64_t generation,
                     const Identity& identity, const std::byte* from, const uint64_t* sums);

}  // namespace kvmem
