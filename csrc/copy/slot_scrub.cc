#include "copy/slot_scrub.h"

#include <algorithm>

#include "copy/cpu/kernels.h"
#include "hash/xxh3_stream.h"

namespace kvmem {
namespace {

// Stays in the first-level cache between the copy and the hash.
constexpr size_t kStageBytes = 16384;

// Hashed from a private buffer: a writer may be changing the slot meanwhile.
uint64_t HashShared(const std::byte* from, uint64_t bytes) {
  alignas(64) std::byte stage[kStageBytes];
  Xxh3Stream hash(bytes);
  for (uint64_t at = 0; at < bytes; at += kStageBytes) {
    const size_t step = std::min<uint64_t>(kStageBytes, bytes - at);
    CopyShared(stage, from + at, step);
    hash.Update(stage, step);
  }
  return hash.Digest();
}

}  // namespace

Scrubbed ScrubShare(const SlotTable& table, uint64_t slot, uint64_t generation, uint64_t* n_bytes) {
  *n_bytes = 0;
  if (!table.IsComplete(slot, generation)) return Scrubbed::kMovedOn;
  const SlotDescriptor& d = table.Descriptor(slot);
  const uint64_t length = d.length.load(std::memory_order_relaxed);
  const uint64_t checksum = d.checksum.load(std::memory_order_relaxed);
  bool same = false;
  if (length > 0 && length <= table.slot_bytes()) {
    same = HashShared(table.Data(slot), length) == checksum;
    *n_bytes = length;
  }
  // A2: read before the stamp is looked at again; a writer that came in between is no fault.
  KernelsFor(DetectCpu()).fence();
  if (!table.IsComplete(slot, generation)) return Scrubbed::kMovedOn;
  return same ? Scrubbed::kSound : Scrubbed::kBad;
}

}  // namespace kvmem
