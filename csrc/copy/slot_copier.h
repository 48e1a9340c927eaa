// Moves blocks between the engine's device memory (here: a CPU engine's) and arena slots, and
// proves that what comes back is what went in.
//
// Thread safety: Store() and Load() may be called from any thread, also at the same time.
// RegisterLayers() comes before either, once for each KV-cache group.
//
// A block of a group is `n_layers` pieces, each at base[layer] + block_id * stride[layer]; a slot
// holds the same pieces side by side, and may have room left. The checksum is XXH3-64 of those
// bytes in that order, taken from the
// bytes as they were written to the destination: from the registers that were stored, or from a
// private buffer between the two sides. So a source that changes during the copy cannot make a
// wrong destination pass (I5).
//
// Invariants
//   S1  No byte outside the registered blocks and the arena's slots is touched: ids are checked
//       first, each by itself.
//   S2  kOk from Load() means that the slot said, before and after the copy, that it holds this
//       key, namespace, group and generation, complete (I1); with verify also that the bytes now
//       in the block have the checksum recorded when they were stored. On any other status the
//       block's bytes are undefined and must be computed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "copy/copy_request.h"
#include "copy/cpu/kernels.h"
#include "copy/slot_table.h"
#include "support/thread_pool.h"

namespace kvmem {

class SlotCopier {
 public:
  // `threads` counts the caller.
  SlotCopier(SlotTable table, int threads, CpuPath path);

  // False and a sentence in *error when the layers are no memory or a slot can't hold them.
  // ENSURES: on false nothing has changed. REQUIRES: !registered(group), group < kMaxGroups.
  bool RegisterLayers(size_t group, std::vector<Layer> layers, uint64_t n_blocks,
                      std::string* error);
  bool registered(size_t group) const {
    return group < kMaxGroups && groups_[group].layout.bytes > 0;
  }

  // Device to arena. kGeneration: the slot already has this generation or a later one (unless it
  // holds the very same block complete: then kOk and its checksum, and nothing is copied).
  // REQUIRES: registered(request.group); the slots differ; no block changes and no slot is given
  // away until this returns (I3).
  void Store(const CopyRequest& request, CopyStatus* status, uint64_t* checksums);

  // Arena to device; verify[i] != 0 compares the checksum. REQUIRES: registered(request.group);
  // the blocks differ and are the caller's to write.
  void Load(const CopyRequest& request, const uint8_t* verify, CopyStatus* status);

  const SlotTable& table() const { return table_; }
  int threads() const { return pool_.threads(); }
  CpuPath path() const { return kernels_->path; }

 private:
  struct Job;
  struct Group {
    BlockLayout layout;
    bool in_step_to_arena = false;
    bool in_step_to_device = false;
  };
  enum class Direction { kToArena, kToDevice };

  CopyItem Item(const Job& job, size_t i) const;
  void StoreSome(const Job& job, size_t first, size_t count);
  void LoadSome(const Job& job, size_t first, size_t count);
  void Run(const Job& job, size_t n, void (SlotCopier::*some)(const Job&, size_t, size_t));
  // Copies up to kMaxLanes blocks and gives the digest of each.
  void CopyHashed(const Job& job, Direction direction, const size_t* items, int n_items,
                  uint64_t* digests);
  void CopyInStep(const Job& job, Direction direction, const size_t* items, int n_items,
                  uint64_t* digests);
  uint64_t CopyStaged(const Job& job, Direction direction, size_t item);
  void CopyUnhashed(const Job& job, size_t item);

  // Immutable after construction.
  const SlotTable table_;
  const CopyKernels* const kernels_;

  // Each immutable after its RegisterLayers().
  std::array<Group, kMaxGroups> groups_;

  ThreadPool pool_;
};

}  // namespace kvmem
