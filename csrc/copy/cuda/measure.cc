// Which method moves blocks of a group's shape best, tried out on memory of its own.

#include <algorithm>
#include <numeric>
#include <vector>

#include "copy/cuda/gpu_copier.h"

namespace kvmem {
namespace {

// Some milliseconds' worth: what a call costs once is little of it.
constexpr uint64_t kTriedBytes = uint64_t{128} << 20;
constexpr int kTimes = 3;
// A method that leaves the multiprocessors to the model's step is taken though it is a little
// slower: the copy engines alone, then the ones with a short kernel.
constexpr double kDmaIsEnough = 1.03;
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

// Blocks of a group's shape in memory of their own, and what it takes to move them.
class Trial {
 public:
  Trial(const BlockLayout& shape, Transfer* transfer, CudaResult* result)
      : transfer_(transfer),
        n_(std::clamp<uint64_t>(kTriedBytes / shape.bytes, 1, Transfer::ItemsOf(shape))),
        device_(MakeDeviceBytes(n_ * shape.bytes, result)),
        host_(MakePinnedBytes(n_ * shape.bytes, result)),
        begin_(MakeTimedEvent(result)),
        end_(MakeTimedEvent(result)),
        blocks_{{}, n_, shape.bytes},
        block_ids_(n_) {
    if (!result->ok()) return;
    auto* base = static_cast<std::byte*>(device_.get());
    for (const Layer& layer : shape.layers) {
      blocks_.layers.push_back({base, layer.piece, layer.piece});
      base += n_ * layer.piece;
    }
    layout_ = PutOnDevice(blocks_, result);
    // In an order that no copy goes on from one to the next.
    std::iota(block_ids_.begin(), block_ids_.end(), 0);
    row_ids_.assign(block_ids_.rbegin(), block_ids_.rend());
  }

  bool even() const { return layout_.even(); }

  // Seconds of all batches that can be in flight, the best of some times.
  double Best(CopyMethod method, CopyWay way, CudaResult* result) {
    double best = 0;
    for (int time = 0; time <= kTimes && result->ok(); ++time) {
      const double took = Once(method, way, result);
      // The first time is not counted.
      if (time == 1 || (time > 1 && took < best)) best = took;
    }
    return best;
  }

 private:
  double Once(CopyMethod method, CopyWay way, CudaResult* result) {
    const HostRows rows{static_cast<std::byte*>(host_.get()), blocks_.bytes};
    transfer_->Begin(transfer_->kernels(), result);
    if (result->ok()) {
      result->Ok(cudaEventRecord(begin_.get(), transfer_->kernels()), "cudaEventRecord");
    }
    for (size_t batch = 0; batch < Transfer::kBatches && result->ok(); ++batch) {
      transfer_->Enqueue(batch, layout_, method, way, rows, block_ids_.data(), row_ids_.data(), n_,
                         even(), result);
    }
    if (result->ok()) {
      result->Ok(cudaEventRecord(end_.get(), transfer_->kernels()), "cudaEventRecord");
    }
    if (result->ok()) result->Ok(cudaEventSynchronize(end_.get()), "cudaEventSynchronize");
    float milliseconds = 0;
    if (result->ok()) {
      result->Ok(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()),
                 "cudaEventElapsedTime");
    }
    return milliseconds / 1e3;
  }

  Transfer* const transfer_;
  const size_t n_;
  const DeviceBytes device_;
  const PinnedBytes host_;
  const TimedEvent begin_;
  const TimedEvent end_;
  BlockLayout blocks_;
  DeviceLayout layout_;
  std::vector<int32_t> block_ids_;
  std::vector<int32_t> row_ids_;
};

}  // namespace

bool GpuCopier::Measure(size_t group, double seconds[2][3]) {
  const std::lock_guard lock(lock_);
  CudaResult result;
  const DeviceGuard guard(device_, &result);
  Group& its = *groups_[group];
  Trial trial(its.blocks, transfer_.get(), &result);
  for (const CopyWay way : {CopyWay::kToHost, CopyWay::kToDevice}) {
    for (const CopyMethod method : {CopyMethod::kDma, CopyMethod::kDirect, CopyMethod::kStaged}) {
      const bool can = method == CopyMethod::kDma || (its.on_device.even() && trial.even());
      seconds[static_cast<size_t>(way)][static_cast<size_t>(method)] =
          can && result.ok() ? trial.Best(method, way, &result) : 0;
    }
  }
  if (!result.ok()) {
    transfer_->Drain();  // before the trial's memory goes
    error_ = result.text();
    return false;
  }
  for (const size_t way : {0, 1}) its.methods[way] = BestOf(seconds[way]);
  return true;
}

}  // namespace kvmem
