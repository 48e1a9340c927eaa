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
  uint64_t Generation(size_t item) const { return request->generations[item]; }
  Identity Block(size_t item) const {
    return {static_cast<uint32_t>(request->group), group->bytes, request->keys + item * kKeyBytes};
  }
};

SlotCopier::SlotCopier(SlotTable table, int threads, CpuPath path)
    : table_(table), kernels_(&KernelsFor(path)), pool_(threads) {}

bool SlotCopier::RegisterLayers(size_t group, std::vector<Layer> layers, uint64_t n_blocks,
                                std::string* error) {
  uint64_t bytes = 0;
  bool blocks_even = kernels_->copy_add != nullptr;
  bool aligned = true;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    uint64_t span;
    const bool overflows =
        __builtin_mul_overflow(n_blocks - 1, layer.stride, &span) ||
        __builtin_add_overflow(span, layer.piece, &span) ||
        __builtin_add_overflow(span, reinterpret_cast<uint64_t>(layer.base), &span) ||
        __builtin_add_overflow(bytes, layer.piece, &bytes);
    if (n_blocks == 0 || n_blocks > INT32_MAX || layer.base == nullptr || layer.piece == 0 ||
        layer.piece > layer.stride || overflows) {
      *error = "layer " + std::to_string(i) + ": " + std::to_string(n_blocks) + " blocks of " +
               std::to_string(layer.piece) + " bytes, " + std::to_string(layer.stride) +
               " apart, are no memory";
      return false;
    }
    blocks_even &= layer.piece % kXxh3Block == 0;
    aligned &= (reinterpret_cast<uint64_t>(layer.base) | layer.stride) % kSlotAlign == 0;
  }
  if (bytes > table_.slot_bytes()) {
    *error = "the layers' pieces make " + std::to_string(bytes) + " bytes, a slot has " +
             std::to_string(table_.slot_bytes());
    return false;
  }
  groups_[group] = {std::move(layers), n_blocks, bytes,
                    blocks_even,  // slots are aligned by the format
                    blocks_even && aligned};
  return true;
}

bool SlotCopier::InRange(const CopyRequest& request, size_t i) const {
  return request.block_ids[i] >= 0 && request.slots[i] >= 0 &&
         static_cast<uint64_t>(request.block_ids[i]) < groups_[request.group].n_blocks &&
         static_cast<uint64_t>(request.slots[i]) < table_.n_slots();
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
    job.checksums[i] = 0;
    if (!InRange(*job.request, i)) {  // S1
      job.status[i] = CopyStatus::kRange;
    } else if (table_.Claim(job.Slot(i), job.Generation(i))) {
      items[static_cast<size_t>(n_items++)] = i;
    } else if (table_.IsComplete(job.Slot(i), job.Generation(i)) &&
               table_.HasIdentity(job.Slot(i), job.Block(i))) {
      job.checksums[i] = table_.Descriptor(job.Slot(i)).checksum.load(std::memory_order_relaxed);
      job.status[i] = CopyStatus::kOk;
    } else {
      job.status[i] = CopyStatus::kGeneration;
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
    const uint64_t digest = digests[static_cast<size_t>(k)];
    const bool done = table_.Complete(job.Slot(i), job.Generation(i), job.Block(i), digest);
    job.status[i] = done ? CopyStatus::kOk : CopyStatus::kGeneration;
    job.checksums[i] = done ? digest : 0;
  }
}

void SlotCopier::LoadSome(const Job& job, size_t first, size_t count) {
  std::array<size_t, kMaxLanes> items;
  std::array<uint64_t, kMaxLanes> recorded;
  std::array<uint64_t, kMaxLanes> digests;
  int n_items = 0;
  for (size_t i = first; i < first + count; ++i) {
    if (!InRange(*job.request, i)) {  // S1
      job.status[i] = CopyStatus::kRange;
      continue;
    }
    const SlotDescriptor& d = table_.Descriptor(job.Slot(i));
    if (table_.Generation(job.Slot(i)) != job.Generation(i)) {
      job.status[i] = CopyStatus::kGeneration;
    } else if (!table_.IsComplete(job.Slot(i), job.Generation(i)) ||
               !table_.HasIdentity(job.Slot(i), job.Block(i))) {  // I1
      job.status[i] = CopyStatus::kIdentity;
    } else if (job.verify[i] != 0) {
      recorded[static_cast<size_t>(n_items)] = d.checksum.load(std::memory_order_relaxed);
      items[static_cast<size_t>(n_items++)] = i;
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
  for (size_t i = first; i < first + count; ++i) {
    const bool copied = job.status[i] == CopyStatus::kOk || job.status[i] == CopyStatus::kChecksum;
    if (copied && !table_.IsComplete(job.Slot(i), job.Generation(i))) {
      job.status[i] = CopyStatus::kGeneration;  // A2: reused underneath
    }
  }
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
  const uint64_t block_bytes = job.group->bytes;
  std::array<Xxh3Stream, kMaxLanes> hashes = {Xxh3Stream(block_bytes), Xxh3Stream(block_bytes),
                                              Xxh3Stream(block_bytes), Xxh3Stream(block_bytes)};
  std::array<CopyLane, kMaxLanes> lanes;
  uint64_t offset = 0;
  for (const Layer& layer : job.group->layers) {
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
  Xxh3Stream hash(job.group->bytes);
  std::byte* slot = table_.Data(job.Slot(item));
  for (const Layer& layer : job.group->layers) {
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
  for (const Layer& layer : job.group->layers) {
    kernels_->copy(job.Device(layer, item), slot, layer.piece);
    slot += layer.piece;
  }
}

}  // namespace kvmem
