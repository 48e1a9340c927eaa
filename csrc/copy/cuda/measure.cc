// Which method moves blocks of a group's shape best, tried out on memory of its own.

#include <algorithm>
#include <numeric>
#include <vector>

#include "copy/cuda/gpu_copier.h"

namespace kvmem {
namespace {

constexpr uint64_t kTriedBytes = uint64_t{32} << 20;
constexpr int kTimes = 3;
// A method that leaves the multiprocessors to the model's step is taken though it is a little
// slower: the copy engines alone, then the ones with a short kernel.
constexpr double kDmaIsEnough = 1.05;
constexpr double kStagedIsEnough = 1.25;

using TimedEvent = CudaHandle<cudaEvent_t, cudaEventDestroy>;

TimedEvent MakeTimedEvent(CudaResult* result) {
  if (!result->ok()) return {};
  cudaEvent_t event = nullptr;
  if (!result->Ok(cudaEventCreate(&event), "cudaEventCreate")) return {};
  return TimedEvent(event);
}

CopyMethod BestOf(const double seconds[3]) {
  const double dma = seconds[static_cast<size_t>(CopyMethod::kDma)];
  const double direct = seconds[static_cast<size_t>(CopyMethod::kDirect)];
  const double staged = seconds[static_cast<size_t>(CopyMethod::kStaged)];
  if (direct == 0) return CopyMethod::kDma;  // the only one that can
  const double best = std::min({dma, direct, staged});
  if (dma <= best * kDmaIsEnough) return CopyMethod::kDma;
  return staged <= best * kStagedIsEnough ? CopyMethod::kStaged : CopyMethod::kDirect;
}

}  // namespace

bool GpuCopier::Measure(size_t group, double seconds[2][3]) {
  const std::lock_guard lock(lock_);
  CudaResult result;
  const DeviceGuard guard(device_, &result);
  Group& its = *groups_[group];
  if (!result.ok() || !Measured(its, seconds, &result)) {
    transfer_->Drain();
    error_ = result.text();
    return false;
  }
  for (const size_t way : {0, 1}) its.methods[way] = BestOf(seconds[way]);
  return true;
}

bool GpuCopier::Measured(const Group& group, double seconds[2][3], CudaResult* result) {
  const uint64_t bytes = group.blocks.bytes;
  const size_t n = std::clamp<uint64_t>(kTriedBytes / bytes, 1, Transfer::ItemsOf(bytes));
  const DeviceBytes device = MakeDeviceBytes(n * bytes, result);
  const PinnedBytes host = MakePinnedBytes(n * bytes, result);
  const TimedEvent begin = MakeTimedEvent(result);
  const TimedEvent end = MakeTimedEvent(result);
  if (!result->ok()) return false;
  BlockLayout blocks{{}, n, bytes};
  auto* base = static_cast<std::byte*>(device.get());
  for (const Layer& layer : group.blocks.layers) {
    blocks.layers.push_back({base, layer.piece, layer.piece});
    base += n * layer.piece;
  }
  const DeviceLayout layout = PutOnDevice(blocks, result);
  // Blocks of the one side, in an order that no copy goes on from one to the next.
  std::vector<int32_t> block_ids(n);
  std::iota(block_ids.begin(), block_ids.end(), 0);
  std::vector<int32_t> row_ids(block_ids.rbegin(), block_ids.rend());
  const HostRows rows{static_cast<std::byte*>(host.get()), bytes};
  const bool even = group.on_device.even() && layout.even();
  for (const CopyWay way : {CopyWay::kToHost, CopyWay::kToDevice}) {
    for (const CopyMethod method : {CopyMethod::kDma, CopyMethod::kDirect, CopyMethod::kStaged}) {
      double& best = seconds[static_cast<size_t>(way)][static_cast<size_t>(method)];
      best = 0;
      if (method != CopyMethod::kDma && !even) continue;
      for (int time = 0; time <= kTimes && result->ok(); ++time) {
        transfer_->Begin(transfer_->kernels(), result);
        if (result->ok()) {
          result->Ok(cudaEventRecord(begin.get(), transfer_->kernels()), "cudaEventRecord");
        }
        if (!result->ok()) break;
        transfer_->Enqueue(0, layout, method, way, rows, block_ids.data(), row_ids.data(), n, even,
                           result);
        if (result->ok()) {
          result->Ok(cudaEventRecord(end.get(), transfer_->kernels()), "cudaEventRecord");
        }
        if (result->ok()) transfer_->Wait(0, result);
        if (result->ok()) result->Ok(cudaEventSynchronize(end.get()), "cudaEventSynchronize");
        float milliseconds = 0;
        if (!result->ok() ||
            !result->Ok(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()),
                        "cudaEventElapsedTime")) {
          break;
        }
        // The first time is not counted.
        const double took = milliseconds / 1e3;
        if (time == 1 || (time > 1 && took < best)) best = took;
      }
    }
  }
  if (!result->ok()) transfer_->Drain();  // before the memory goes
  return result->ok();
}

}  // namespace kvmem
