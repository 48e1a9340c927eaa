// Looks at blocks that nobody asked for: whether the bytes in a slot still have the checksum that
// they were stored with.
//
// Thread safety: any thread, beside writers. It writes nothing, and takes no lock.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy/slot_table.h"

namespace kvmem {

enum class Scrubbed : uint8_t { kSound = 0, kBad = 1, kMovedOn = 2 };

// One share of a slot. kMovedOn: it is not, or not any more, complete under that generation, so
// nothing is said of it. A descriptor that says what cannot be is kBad. *n_bytes is what was read.
// REQUIRES: slot < table.n_slots().
Scrubbed ScrubShare(const SlotTable& table, uint64_t slot, uint64_t generation, uint64_t* n_bytes);

}  // namespace kvmem
