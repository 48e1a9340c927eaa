#include "copy/cuda/gpu_copier.h"

#include <algorithm>
#include <utility>

#include "hash/xxh3.h"
#include "hash/xxh3_stream.h"

namespace kvmem {

// One call.
struct GpuCopier::Job {
  const CopyRequest& request;
  const Group& group;
  CopyWay way;
  cudaStream_t after;
  bool compared;  // a load's blocks with what was recorded
  CopyStatus* status;
  uint64_t* checksums;  // a store's, by item; a load's recorded ones

  bool stores() const { return way == CopyWay::kToHost; }
  // On the device; layouts that it can't hash are hashed in the slot.
  bool hashed() const { return (stores() || compared) && group.on_device.even(); }
};

std::unique_ptr<GpuCopier> GpuCopier::Make(SlotTable table, std::byte* arena, size_t arena_bytes,
                                           int device, unsigned grid, std::string* error) {
  std::unique_ptr<GpuCopier> copier(new GpuCopier(table, device));
  CudaResult result;
  const DeviceGuard guard(device, &result);
  if (result.ok()) copier->arena_ = HostRegistration::Of(arena, arena_bytes, &result);
  if (result.ok()) copier->transfer_ = std::make_unique<Transfer>(grid, &result);
  if (result.ok()) return copier;
  *error = result.text();
  return nullptr;
}

GpuCopier::~GpuCopier() {
  CudaResult result;
  const DeviceGuard guard(device_, &result);
  transfer_.reset();
  for (auto& group : groups_) group.reset();
}

bool GpuCopier::RegisterLayers(size_t group, std::vector<Layer> layers, uint64_t n_blocks,
                               std::string* error) {
  auto made = std::make_unique<Group>();
  made->blocks = LayoutOf(std::move(layers), n_blocks, table_.slot_bytes(), error);
  if (made->blocks.bytes == 0) return false;
  CudaResult result;
  const DeviceGuard guard(device_, &result);
  for (const Layer& layer : made->blocks.layers) {
    const std::byte* const last = layer.base + (n_blocks - 1) * layer.stride + layer.piece - 1;
    if (!IsOnDevice(layer.base, device_, error) || !IsOnDevice(last, device_, error)) return false;
  }
  const std::lock_guard lock(lock_);
  if (result.ok()) transfer_->MakeRoom(made->blocks, &result);
  if (result.ok()) made->on_device = PutOnDevice(made->blocks, &result);
  if (!result.ok()) {
    *error = result.text();
    return false;
  }
  groups_[group] = std::move(made);
  return true;
}

bool GpuCopier::SetMethod(size_t group, CopyWay way, CopyMethod method) {
  const std::lock_guard lock(lock_);
  Group& its = *groups_[group];
  if (method != CopyMethod::kDma && !its.on_device.even()) return false;
  its.methods[static_cast<size_t>(way)] = method;
  return true;
}

HostRows GpuCopier::Slots() const {
  std::byte* const first = table_.Data(0);
  return {first, static_cast<uint64_t>(table_.Data(1) - first)};
}

void GpuCopier::Store(const CopyRequest& request, cudaStream_t after, CopyStatus* status,
                      uint64_t* checksums) {
  const std::lock_guard lock(lock_);
  Run({request, *groups_[request.group], CopyWay::kToHost, after, false, status, checksums});
}

void GpuCopier::Load(const CopyRequest& request, const uint8_t* verify, cudaStream_t after,
                     CopyStatus* status) {
  const std::lock_guard lock(lock_);
  const bool compared = std::any_of(verify, verify + request.n, [](uint8_t v) { return v != 0; });
  std::vector<uint64_t> recorded(request.n);
  Run({request, *groups_[request.group], CopyWay::kToDevice, after, compared, status,
       recorded.data()});
}

std::vector<size_t> GpuCopier::Take(const Job& job, size_t n, size_t* next) {
  std::vector<size_t> items;
  for (; *next < job.request.n && items.size() < n; ++*next) {
    const size_t i = *next;
    const CopyItem item{table_, job.request, job.group.blocks, i};
    if (job.stores()) {
      if (!item.BeginStore(&job.status[i], &job.checksums[i])) continue;
    } else {
      if (!item.BeginLoad(&job.status[i], &job.checksums[i])) continue;
      if (job.compared && !job.hashed() &&
          Xxh3_64(table_.Data(item.slot()), job.group.blocks.bytes) != job.checksums[i]) {
        job.status[i] = CopyStatus::kChecksum;
        item.EndLoad(&job.status[i]);
        continue;
      }
    }
    job.status[i] = CopyStatus::kDevice;  // until its batch is known to be whole
    items.push_back(i);
  }
  return items;
}

void GpuCopier::Run(const Job& job) {
  CudaResult result;
  const DeviceGuard guard(device_, &result);
  const CopyMethod method = job.group.methods[static_cast<size_t>(job.way)];
  const size_t at_a_time = Transfer::ItemsOf(job.group.blocks);
  // Of items that no batch came to: the device failed before.
  std::fill_n(job.status, job.request.n, CopyStatus::kDevice);
  if (job.stores()) std::fill_n(job.checksums, job.request.n, 0);
  std::array<std::vector<size_t>, Transfer::kBatches> in_flight;
  std::vector<int32_t> block_ids;
  std::vector<int32_t> slots;
  size_t batch = 0;
  bool begun = false;
  for (size_t next = 0; next < job.request.n && result.ok();) {
    std::vector<size_t>& its = in_flight[batch];
    if (!its.empty()) Finish(job, batch, its, &result);
    its.clear();
    if (!result.ok()) break;
    its = Take(job, at_a_time, &next);
    if (its.empty()) break;
    block_ids.clear();
    slots.clear();
    for (const size_t i : its) {
      block_ids.push_back(job.request.block_ids[i]);
      slots.push_back(job.request.slots[i]);
    }
    if (!begun) transfer_->Begin(job.after, &result);
    begun = true;
    if (result.ok()) {
      transfer_->Enqueue(batch, job.group.on_device, method, job.way, Slots(), block_ids.data(),
                         slots.data(), its.size(), job.hashed(), &result);
    }
    batch = (batch + 1) % Transfer::kBatches;
  }
  for (size_t i = 0; i < Transfer::kBatches && result.ok(); ++i) {
    if (!in_flight[batch].empty()) Finish(job, batch, in_flight[batch], &result);
    in_flight[batch].clear();
    batch = (batch + 1) % Transfer::kBatches;
  }
  if (result.ok()) return;
  transfer_->Drain();  // S3
  error_ = result.text();
}

void GpuCopier::Finish(const Job& job, size_t batch, const std::vector<size_t>& items,
                       CudaResult* result) {
  transfer_->Wait(batch, result);
  if (!result->ok()) return;
  const uint64_t n_bytes = job.group.blocks.bytes;
  const uint64_t* const accumulators = transfer_->Accumulators(batch);
  for (size_t k = 0; k < items.size(); ++k) {
    const size_t i = items[k];
    const CopyItem item{table_, job.request, job.group.blocks, i};
    uint64_t digest = 0;
    if (job.hashed()) {
      digest = Xxh3DigestOf(accumulators + 8 * k, n_bytes);
    } else if (job.stores()) {
      digest = Xxh3_64(table_.Data(item.slot()), n_bytes);
    }
    if (job.stores()) {
      item.EndStore(digest, &job.status[i], &job.checksums[i]);
    } else {
      const bool same = !job.hashed() || digest == job.checksums[i];
      job.status[i] = same ? CopyStatus::kOk : CopyStatus::kChecksum;
      item.EndLoad(&job.status[i]);
    }
  }
}

std::string GpuCopier::error() const {
  const std::lock_guard lock(lock_);
  return error_;
}

}  // namespace kvmem
