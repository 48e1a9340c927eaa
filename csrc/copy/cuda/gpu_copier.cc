#include "copy/cuda/gpu_copier.h"

#include <algorithm>
#include <utility>

#include "hash/xxh3.h"
#include "hash/xxh3_stream.h"

namespace kvmem {

// One call: which items are to be copied, and what is known of each.
struct GpuCopier::Job {
  const CopyRequest& request;
  const Group& group;
  CopyWay way;
  cudaStream_t after;
  bool hashed;
  CopyStatus* status;
  uint64_t* checksums;              // a store's, else null
  std::vector<size_t> items;        // of the request, to be copied
  std::vector<uint64_t> recorded;   // a load's: by item of the request
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
  if (result.ok()) transfer_->MakeRoom(made->blocks.bytes, &result);
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
  const Group& group = *groups_[request.group];
  Job job{request, group, CopyWay::kToHost, after, group.on_device.even(),
          status,  checksums, {},           {}};
  for (size_t i = 0; i < request.n; ++i) {
    const CopyItem item{table_, request, group.blocks, i};
    if (item.BeginStore(&status[i], &checksums[i])) job.items.push_back(i);
  }
  Run(job);
}

void GpuCopier::Load(const CopyRequest& request, const uint8_t* verify, cudaStream_t after,
                     CopyStatus* status) {
  const std::lock_guard lock(lock_);
  const Group& group = *groups_[request.group];
  const bool compared = std::any_of(verify, verify + request.n, [](uint8_t v) { return v != 0; });
  const bool on_device = compared && group.on_device.even();
  Job job{request, group,   CopyWay::kToDevice, after, on_device,
          status,  nullptr, {},                 std::vector<uint64_t>(request.n)};
  for (size_t i = 0; i < request.n; ++i) {
    const CopyItem item{table_, request, group.blocks, i};
    if (!item.BeginLoad(&status[i], &job.recorded[i])) continue;
    if (compared && !on_device &&
        Xxh3_64(table_.Data(item.slot()), group.blocks.bytes) != job.recorded[i]) {
      status[i] = CopyStatus::kChecksum;
      item.EndLoad(&status[i]);
      continue;
    }
    job.items.push_back(i);
  }
  Run(job);
}

void GpuCopier::Run(const Job& job) {
  if (job.items.empty()) return;
  CudaResult result;
  const DeviceGuard guard(device_, &result);
  const auto way = static_cast<size_t>(job.way);
  const CopyMethod method = job.group.methods[way];
  const size_t at_a_time = Transfer::ItemsOf(job.group.blocks.bytes);
  // Until a batch is known to be whole.
  for (const size_t i : job.items) job.status[i] = CopyStatus::kDevice;
  std::array<std::vector<size_t>, Transfer::kBatches> in_flight;
  if (result.ok()) transfer_->Begin(job.after, &result);
  size_t batch = 0;
  for (size_t first = 0; first < job.items.size() && result.ok(); first += at_a_time) {
    std::vector<size_t>& its = in_flight[batch];
    if (!its.empty()) Finish(job, batch, its, &result);
    const size_t n = std::min(at_a_time, job.items.size() - first);
    its.assign(job.items.begin() + static_cast<std::ptrdiff_t>(first),
               job.items.begin() + static_cast<std::ptrdiff_t>(first + n));
    std::vector<int32_t> block_ids;
    std::vector<int32_t> slots;
    for (const size_t i : its) {
      block_ids.push_back(job.request.block_ids[i]);
      slots.push_back(job.request.slots[i]);
    }
    if (result.ok()) {
      transfer_->Enqueue(batch, job.group.on_device, method, job.way, Slots(), block_ids.data(),
                         slots.data(), n, job.hashed, &result);
    }
    batch = (batch + 1) % Transfer::kBatches;
  }
  for (size_t i = 0; i < Transfer::kBatches && result.ok(); ++i) {
    if (!in_flight[batch].empty()) Finish(job, batch, in_flight[batch], &result);
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
    if (job.hashed) {
      digest = Xxh3DigestOf(accumulators + 8 * k, n_bytes);
    } else if (job.checksums != nullptr) {
      digest = Xxh3_64(table_.Data(item.slot()), n_bytes);
    }
    if (job.checksums != nullptr) {
      item.EndStore(digest, &job.status[i], &job.checksums[i]);
    } else {
      const bool same = !job.hashed || digest == job.recorded[i];
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
