#include "copy/slot_shares.h"

#include "copy/copy_hashed.h"
#include "copy/cpu/kernels.h"

namespace kvmem {

CopyStatus LookAtShares(const std::vector<SlotTable>& tables, uint64_t slot, uint64_t generation,
                        uint32_t group, const std::byte* key, uint64_t* length, uint64_t* sums) {
  if (!tables[0].IsComplete(slot, generation)) return CopyStatus::kGeneration;
  *length = tables[0].Descriptor(slot).length.load(std::memory_order_relaxed);
  if (*length == 0 || *length > tables[0].slot_bytes()) return CopyStatus::kIdentity;
  const Identity identity = {group, *length, key};
  for (size_t rank = 0; rank < tables.size(); ++rank) {
    const SlotTable& table = tables[rank];
    if (!table.HasIdentity(slot, identity)) return CopyStatus::kIdentity;  // I1
    sums[rank] = table.Descriptor(slot).checksum.load(std::memory_order_relaxed);
  }
  // A2: what was read before, the bytes included, is older than this look at the stamps.
  KernelsFor(DetectCpu()).fence();
  for (const SlotTable& table : tables) {
    if (!table.IsComplete(slot, generation)) return CopyStatus::kGeneration;
  }
  return CopyStatus::kOk;
}

CopyStatus PutShares(const std::vector<SlotTable>& tables, uint64_t slot, uint64_t generation,
                     const Identity& identity, const std::byte* from, const uint64_t* sums) {
  if (identity.length == 0 || identity.length > tables[0].slot_bytes()) return CopyStatus::kRange;
  const CopyKernels& kernels = KernelsFor(DetectCpu());
  for (size_t rank = 0; rank < tables.size(); ++rank) {
    const SlotTable& table = tables[rank];
    if (!table.Claim(slot, generation)) return CopyStatus::kGeneration;
    // A2, I4: kWriting is seen before any byte, every byte before kComplete.
    kernels.fence();
    const std::byte* share = from + rank * identity.length;
    // I5: the sum is of what was written, so bytes that change meanwhile are seen too.
    if (CopyHashed(kernels, table.Data(slot), share, identity.length) != sums[rank]) {
      return CopyStatus::kChecksum;
    }
  }
  kernels.fence();
  for (size_t rank = 0; rank < tables.size(); ++rank) {
    if (!tables[rank].Complete(slot, generation, identity, sums[rank])) {
      return CopyStatus::kGeneration;
    }
  }
  return CopyStatus::kOk;
}

}  // namespace kvmem
