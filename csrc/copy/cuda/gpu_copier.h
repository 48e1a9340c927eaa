// SlotCopier's counterpart for a GPU: moves blocks between a device's layers and one rank's shares
// of the arena's slots, and proves that what comes back is what went in.
//
// Thread safety: one call at a time goes on; others wait. Make one for each direction, so that a
// load under way does not hold a store up.
//
// The checksum is the slots' own, XXH3-64 of a block's bytes, taken on the device: a store's from
// the block as it lies in device memory, a load's from the bytes that arrived there. So it covers
// the way over the bus and back. Layouts whose pieces are no multiples of 1,024 bytes, or not
// aligned to 16, are hashed on the host instead, in the slot.
//
// Invariants: SlotCopier's S1 and S2, and
//   S3  A call answers when nothing that it enqueued is under way any more, also after a failure:
//       its slots and blocks may be given away (I3).
//   S4  A failure of the device costs its blocks (kDevice) and nothing else; error() says what.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "copy/copy_request.h"
#include "copy/cuda/transfer.h"
#include "copy/slot_table.h"

namespace kvmem {

class GpuCopier {
 public:
  // Registers the arena's bytes with the device; null and a sentence in *error when it can't.
  // `grid`: thread blocks of a kernel, at most. REQUIRES: the arena stays mapped for as long.
  static std::unique_ptr<GpuCopier> Make(SlotTable table, std::byte* arena, size_t arena_bytes,
                                         int device, unsigned grid, std::string* error);
  ~GpuCopier();
  GpuCopier(const GpuCopier&) = delete;
  GpuCopier& operator=(const GpuCopier&) = delete;

  // As SlotCopier::RegisterLayers; the layers are memory of this device. The method is kDma until
  // SetMethod() or Measure(). REQUIRES: !registered(group), group < kMaxGroups.
  bool RegisterLayers(size_t group, std::vector<Layer> layers, uint64_t n_blocks,
                      std::string* error);
  bool registered(size_t group) const { return group < kMaxGroups && groups_[group] != nullptr; }

  // What each method takes for blocks like this group's, on memory of its own; the better one is
  // set. seconds[way][method], 0 where a method cannot move them. False and error() on a failure.
  // REQUIRES: registered(group).
  bool Measure(size_t group, double seconds[2][3]);
  // False when the method cannot move the group's layout. REQUIRES: registered(group).
  bool SetMethod(size_t group, CopyWay way, CopyMethod method);
  CopyMethod method(size_t group, CopyWay way) const {
    return groups_[group]->methods[static_cast<size_t>(way)];
  }

  // Device to arena, after what is on the stream `after` now; returns when the slots are complete.
  // REQUIRES: as SlotCopier::Store.
  void Store(const CopyRequest& request, cudaStream_t after, CopyStatus* status,
             uint64_t* checksums);

  // Arena to device, after what is on `after` now; returns when the blocks are. Where any of
  // verify[i] is not 0 all blocks of the call are compared: the device hashes them as they arrive.
  // REQUIRES: as SlotCopier::Load.
  void Load(const CopyRequest& request, const uint8_t* verify, cudaStream_t after,
            CopyStatus* status);

  const SlotTable& table() const { return table_; }
  int device() const { return device_; }
  // What failed last, empty while nothing has.
  std::string error() const;

 private:
  struct Group {
    BlockLayout blocks;
    DeviceLayout on_device;
    std::array<CopyMethod, 2> methods = {CopyMethod::kDma, CopyMethod::kDma};
  };
  struct Job;

  GpuCopier(SlotTable table, int device) : table_(table), device_(device) {}

  void Run(const Job& job);
  // Items from *next on that are to be copied, at most n; *next is the first that was not looked
  // at.
  std::vector<size_t> Take(const Job& job, size_t n, size_t* next);
  void Finish(const Job& job, size_t batch, const std::vector<size_t>& items, CudaResult* result);
  HostRows Slots() const;

  // Immutable after construction.
  const SlotTable table_;
  const int device_;
  std::unique_ptr<HostRegistration> arena_;

  // Each immutable after its RegisterLayers(), but for its methods: guarded by lock_.
  std::array<std::unique_ptr<Group>, kMaxGroups> groups_;

  mutable std::mutex lock_;
  // Guarded by lock_.
  std::unique_ptr<Transfer> transfer_;
  std::string error_;
};

}  // namespace kvmem
