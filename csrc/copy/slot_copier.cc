#include "copy/slot_copier.h"

#include <algorithm>
#include <array>
#include <utility>

#include "hash/xxh3_stream.h"

namespace kvmem {
namespace {

// Stays in the first-level cache between the copy in, the hash and the copy out.
constexpr size_t kStageBytes = 16384;

}  // namespace

struct SlotCopier::Job {
  const CopyRequest* request;
  const Group* group;
  const uint8_t* verify;  // null for stores
  CopyStatus* status;
  uint64_t* checksums;  // null for loads
  std::byte* Device(const Layer& layer, size_t item) const {
    return layer.base + static_cast<uint64_t>(request->block_ids[item]) * layer.stride;
  }
  uint64_t Slot(size_t item) const { return static_cast<uint64_t>(request->slots[item]); }
};

SlotCopier::SlotCopier(SlotTable table, int threads, CpuPath path)
    : table_(table), kernels_(&KernelsFor(path)), pool_(threads) {}

bool SlotCopier::RegisterLayers(size_t group, std::vector<Layer> layers, uint64_t n_blocks,
                                std::string* error) {
  BlockLayout layout = LayoutOf(std::move(layers), n_blocks, table_.slot_bytes(), error);
  if (layout.bytes == 0) return false;
  bool blocks_even = kernels_->copy_add != nullptr;
  bool aligned = true;
  for (const Layer& layer : layout.layers) {
    blocks_even &= layer.piece % kXxh3Block == 0;
    aligned &= (reinterpret_cast<uint64_t>(layer.base) | layer.stride) % kSlotAlign == 0;
  }
  groups_[group] = {std::move(layout),
                    blocks_even,  // slots are aligned by the format
                    blocks_even && aligned};
  return true;
}

CopyItem SlotCopier::Item(const Job& job, size_t i) const {
  return {table_, *job.request, job.group->layout, i};
}

void SlotCopier::Run(const Job& job, size_t n,
                     void (SlotCopier::*some)(const Job&, size_t, size_t)) {
  // As many lanes as there are blocks for, but every thread gets some.
  const size_t threads = static_cast<size_t>(pool_.threads());
  const size_t width =
      std::clamp<size_t>((n + threads - 1) / threads, 1, static_cast<size_t>(kMaxLanes));
  struct Context {
    SlotCopier* self;
    const Job* job;
    size_t n;
    size_t width;
    void (SlotCopier::*some)(const Job&, size_t, size_t);
  } context{this, &job, n, width, some};
  pool_.For((n + width - 1) / width,
            [](void* opaque, size_t index) {
              const auto& c = *static_cast<Context*>(opaque);
              const size_t first = index * c.width;
              (c.self->*c.some)(*c.job, first, std::min(c.width, c.n - first));
            },
            &context);
}

void SlotCopier::Store(const CopyRequest& request, CopyStatus* status, uint64_t* checksums) {
  const Job job{&request, &groups_[request.group], nullptr, status, checksums};
  Run(job, request.n, &SlotCopier::StoreSome);
}

void SlotCopier::Load(const CopyRequest& request, const uint8_t* verify, CopyStatus* status) {
  const Job job{&request, &groups_[request.group], verify, status, nullptr};
  Run(job, request.n, &SlotCopier::LoadSome);
}

void SlotCopier::StoreSome(const Job& job, size_t first, size_t count) {
  std::array<size_t, kMaxLanes> items;
  int n_items = 0;
  for (size_t i = first; i < first + count; ++i) {
    if (Item(job, i).BeginStore(&job.status[i], &job.checksums[i])) {
      items[static_cast<size_t>(n_items++)] = i;
    }
  }
  if (n_items == 0) return;
  std::array<uint64_t, kMaxLanes> digests;
  // A2, I4: kWriting is seen before any byte, every byte before kComplete. Non-temporal stores
  // keep no order of their own.
  kernels_->fence();
  CopyHashed(job, Direction::kToArena, items.data(), n_items, digests.data());
  kernels_->fence();
  for (int k = 0; k < n_items; ++k) {
    const size_t i = items[static_cast<size_t>(k)];
    Item(job, i).EndStore(digests[static_cast<size_t>(k)], &job.status[i], &job.checksums[i]);
  }
}

void SlotCopier::LoadSome(const Job& job, size_t first, size_t count) {
  std::array<size_t, kMaxLanes> items;
  std::array<uint64_t, kMaxLanes> recorded;
  std::array<uint64_t, kMaxLanes> digests;
  int n_items = 0;
  for (size_t i = first; i < first + count; ++i) {
    const auto lane = static_cast<size_t>(n_items);
    if (!Item(job, i).BeginLoad(&job.status[i], &recorded[lane])) continue;
    if (job.verify[i] != 0) {
      items[lane] = i;
      ++n_items;
    } else {
      CopyUnhashed(job, i);
      job.status[i] = CopyStatus::kOk;
    }
  }
  if (n_items > 0) CopyHashed(job, Direction::kToDevice, items.data(), n_items, digests.data());
  for (int k = 0; k < n_items; ++k) {
    const auto lane = static_cast<size_t>(k);
    job.status[items[lane]] =
        digests[lane] == recorded[lane] ? CopyStatus::kOk : CopyStatus::kChecksum;
  }
  // The reads above come before these; then the block's bytes before the caller's next step.
  kernels_->fence();
  for (size_t i = first; i < first + count; ++i) Item(job, i).EndLoad(&job.status[i]);
}

void SlotCopier::CopyHashed(const Job& job, Direction direction, const size_t* items, int n_items,
                            uint64_t* digests) {
  const bool to_arena = direction == Direction::kToArena;
  if (to_arena ? job.group->in_step_to_arena : job.group->in_step_to_device) {
    CopyInStep(job, direction, items, n_items, digests);
    return;
  }
  for (int k = 0; k < n_items; ++k) digests[k] = CopyStaged(job, direction, items[k]);
}

void SlotCopier::CopyInStep(const Job& job, Direction direction, const size_t* items, int n_items,
                            uint64_t* digests) {
  const bool to_arena = direction == Direction::kToArena;
  const auto n_lanes = static_cast<size_t>(n_items);
  const uint64_t block_bytes = job.group->layout.bytes;
  std::array<Xxh3Stream, kMaxLanes> hashes = {Xxh3Stream(block_bytes), Xxh3Stream(block_bytes),
                                              Xxh3Stream(block_bytes), Xxh3Stream(block_bytes)};
  std::array<CopyLane, kMaxLanes> lanes;
  uint64_t offset = 0;
  for (const Layer& layer : job.group->layout.layers) {
    // The hash's last block is not like the others: it goes through a private buffer.
    const bool last_layer = offset + layer.piece == block_bytes;
    const size_t bytes = layer.piece - (last_layer ? kXxh3Block : 0);
    for (size_t k = 0; k < n_lanes; ++k) {
      std::byte* const device = job.Device(layer, items[k]);
      std::byte* const slot = table_.Data(job.Slot(items[k])) + offset;
      lanes[k] = {to_arena ? slot : device, to_arena ? device : slot, hashes[k].accumulators()};
    }
    if (bytes > 0) kernels_->copy_add(lanes.data(), n_items, bytes);
    offset += layer.piece;
    if (!last_layer) continue;
    for (size_t k = 0; k < n_lanes; ++k) {
      alignas(64) std::byte stage[kXxh3Block];
      CopyShared(stage, lanes[k].src + bytes, kXxh3Block);
      hashes[k].SkipBlocks((block_bytes - 1) / kXxh3Block);
      hashes[k].Update(stage, kXxh3Block);
      kernels_->copy(lanes[k].dst + bytes, stage, kXxh3Block);
      digests[k] = hashes[k].Digest();
    }
  }
}

uint64_t SlotCopier::CopyStaged(const Job& job, Direction direction, size_t item) {
  const bool to_arena = direction == Direction::kToArena;
  alignas(64) std::byte stage[kStageBytes];
  Xxh3Stream hash(job.group->layout.bytes);
  std::byte* slot = table_.Data(job.Slot(item));
  for (const Layer& layer : job.group->layout.layers) {
    std::byte* const device = job.Device(layer, item);
    for (uint64_t at = 0; at < layer.piece; at += kStageBytes) {
      const size_t step = std::min<uint64_t>(kStageBytes, layer.piece - at);
      CopyShared(stage, (to_arena ? device : slot) + at, step);
      hash.Update(stage, step);
      kernels_->copy((to_arena ? slot : device) + at, stage, step);
    }
    slot += layer.piece;
  }
  return hash.Digest();
}

void SlotCopier::CopyUnhashed(const Job& job, size_t item) {
  const std::byte* slot = table_.Data(job.Slot(item));
  for (const Layer& layer : job.group->layout.layers) {
    kernels_->copy(job.Device(layer, item), slot, layer.piece);
    slot += layer.piece;
  }
}

}  // namespace kvmem
