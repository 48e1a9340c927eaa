#include "copy/slot_scrub.h"

#include "copy/cpu/kernels.h"
#include "hash/xxh3.h"

namespace kvmem {

Scrubbed ScrubShare(const SlotTable& table, uint64_t slot, uint64_t generation,
                    std::vector<std::byte>* room, uint64_t* n_bytes) {
  *n_bytes = 0;
  if (!table.IsComplete(slot, generation)) return Scrubbed::kMovedOn;
  const SlotDescriptor& d = table.Descriptor(slot);
  const uint64_t length = d.length.load(std::memory_order_relaxed);
  const uint64_t checksum = d.checksum.load(std::memory_order_relaxed);
  bool same = false;
  if (length > 0 && length <= table.slot_bytes()) {
    room->resize(table.slot_bytes());
    CopyShared(room->data(), table.Data(slot), length);
    *n_bytes = length;
    same = Xxh3_64(room->data(), length) == checksum;
  }
  // Read before the stamp is looked at again: a writer that came in between is no fault.
  KernelsFor(DetectCpu()).fence();
  if (!table.IsComplete(slot, generation)) return Scrubbed::kMovedOn;
  return same ? Scrubbed::kSound : Scrubbed::kBad;
}

}  // namespace kvmem
