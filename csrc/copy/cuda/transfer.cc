#include "copy/cuda/transfer.h"

#include <algorithm>
#include <cstring>

#include "hash/xxh3_stream.h"

namespace kvmem {
namespace {

constexpr uint64_t kWordBytes = 16;  // of a kernel's load and store

uint64_t StepBytesOf(const BlockLayout& blocks) {
  uint64_t step = 4096;
  for (const Layer& layer : blocks.layers) {
    if ((reinterpret_cast<uint64_t>(layer.base) | layer.stride) % kWordBytes != 0) return 0;
    if (layer.piece % 4096 != 0) step = kXxh3Block;
    if (layer.piece % kXxh3Block != 0) return 0;
  }
  return step;
}

}  // namespace

DeviceLayout PutOnDevice(const BlockLayout& blocks, CudaResult* result) {
  DeviceLayout layout;
  layout.blocks = &blocks;
  const uint64_t step_bytes = StepBytesOf(blocks);
  // A unit of a kernel's work is numbered by 32 bits.
  if (step_bytes == 0 || blocks.bytes / step_bytes > UINT32_MAX / Transfer::kBatchItems) {
    return layout;
  }
  std::vector<StepAddress> steps;
  for (const Layer& layer : blocks.layers) {
    for (uint64_t at = 0; at < layer.piece; at += step_bytes) {
      steps.push_back({layer.base + at, layer.stride});
    }
  }
  const size_t n_bytes = steps.size() * sizeof(StepAddress);
  layout.steps = MakeDeviceBytes(n_bytes, result);
  if (result->ok() &&
      result->Ok(cudaMemcpy(layout.steps.get(), steps.data(), n_bytes, cudaMemcpyHostToDevice),
                 "cudaMemcpy")) {
    layout.n_steps = static_cast<uint32_t>(steps.size());
    layout.step_kib = static_cast<uint32_t>(step_bytes / 1024);
  }
  return layout;
}

void AppendRun(CopyRun run, std::vector<CopyRun>* runs) {
  if (!runs->empty()) {
    CopyRun& last = runs->back();
    if (last.device + last.bytes == run.device && last.host + last.bytes == run.host) {
      last.bytes += run.bytes;
      return;
    }
  }
  runs->push_back(run);
}

// What one Enqueue() was asked, with its ids where kernels read them.
struct Transfer::Work {
  const DeviceLayout& layout;
  CopyMethod method;
  CopyWay way;
  const HostRows& rows;
  const int32_t* block_ids;
  const int32_t* row_ids;
  size_t n;
  const int32_t* device_block_ids;
  const int32_t* device_row_ids;
  uint64_t* sums;  // null: no hash

  uint64_t block_bytes() const { return layout.blocks->bytes; }
  Move move() const { return way == CopyWay::kToHost ? Move::kGather : Move::kScatter; }
  std::byte* Row(size_t i) const {
    return rows.base + static_cast<uint64_t>(row_ids[i]) * rows.stride;
  }
  // Items [first, first + count), whose rows lie at `at`, or where the ids say.
  MoveBatch Some(size_t first, size_t count, std::byte* at) const {
    return {static_cast<const StepAddress*>(layout.steps.get()),
            layout.n_steps,
            layout.step_kib,
            device_block_ids + first,
            at != nullptr ? nullptr : device_row_ids + first,
            at != nullptr ? at : rows.base,
            at != nullptr ? block_bytes() : rows.stride,
            static_cast<uint32_t>(count),
            sums == nullptr ? nullptr : sums + first * layout.n_chunks() * 8};
  }
};

Transfer::Transfer(unsigned grid, CudaResult* result)
    : grid_(grid),
      kernels_(MakeStream(result)),
      copies_(MakeStream(result)),
      entry_(MakeEvent(result)),
      copied_(MakeEvent(result)) {
  constexpr size_t kIdsBytes = 2 * kBatchItems * sizeof(int32_t);
  for (Batch& batch : batches_) {
    batch.host_ids = MakePinnedBytes(kIdsBytes, result);
    batch.ids = MakeDeviceBytes(kIdsBytes, result);
    batch.accumulators = MakePinnedBytes(kBatchItems * 8 * sizeof(uint64_t), result);
    batch.done = MakeEvent(result);
  }
  for (Chunk& chunk : ring_) {
    chunk.full = MakeEvent(result);
    chunk.free = MakeEvent(result);
  }
}

size_t Transfer::ItemsOf(const BlockLayout& blocks) {
  const uint64_t most = std::min<uint64_t>(kBatchItems, blocks.n_blocks);
  return std::clamp<uint64_t>(kBatchBytes / blocks.bytes, 1, most);
}

void Transfer::MakeRoom(const BlockLayout& blocks, CudaResult* result) {
  const uint64_t batch_bytes = ItemsOf(blocks) * blocks.bytes;
  const uint64_t sum_bytes = batch_bytes / kXxh3Block * 8 * sizeof(uint64_t);
  const uint64_t chunk_bytes = std::max(blocks.bytes, std::min(batch_bytes, kChunkBytes));
  if (sum_bytes > sum_bytes_) {
    for (Batch& batch : batches_) batch.sums = MakeDeviceBytes(sum_bytes, result);
    if (result->ok()) sum_bytes_ = sum_bytes;
  }
  if (chunk_bytes > chunk_bytes_) {
    for (Chunk& chunk : ring_) chunk.bytes = MakeDeviceBytes(chunk_bytes, result);
    if (result->ok()) chunk_bytes_ = chunk_bytes;
  }
}

void Transfer::Order(cudaStream_t earlier, const CudaEvent& event, cudaStream_t later,
                     CudaResult* result) {
  if (result->Ok(cudaEventRecord(event.get(), earlier), "cudaEventRecord")) {
    result->Ok(cudaStreamWaitEvent(later, event.get(), 0), "cudaStreamWaitEvent");
  }
}

void Transfer::Begin(cudaStream_t after, CudaResult* result) {
  Order(after, entry_, kernels_.get(), result);
  if (result->ok()) {
    result->Ok(cudaStreamWaitEvent(copies_.get(), entry_.get(), 0), "cudaStreamWaitEvent");
  }
}

void Transfer::Enqueue(size_t batch, const DeviceLayout& layout, CopyMethod method, CopyWay way,
                       const HostRows& rows, const int32_t* block_ids, const int32_t* row_ids,
                       size_t n, bool hashed, CudaResult* result) {
  Batch& its = batches_[batch];
  auto* const host_ids = static_cast<int32_t*>(its.host_ids.get());
  auto* const ids = static_cast<int32_t*>(its.ids.get());
  const bool kernel = hashed || method != CopyMethod::kDma;
  if (kernel) {
    std::copy_n(block_ids, n, host_ids);
    std::copy_n(row_ids, n, host_ids + kBatchItems);
    const size_t n_bytes = (kBatchItems + n) * sizeof(int32_t);
    if (!result->Ok(cudaMemcpyAsync(ids, host_ids, n_bytes, cudaMemcpyHostToDevice, kernels_.get()),
                    "cudaMemcpyAsync")) {
      return;
    }
  }
  auto* const sums = hashed ? static_cast<uint64_t*>(its.sums.get()) : nullptr;
  const Work work{layout, method, way, rows, block_ids, row_ids, n, ids, ids + kBatchItems, sums};
  switch (method) {
    case CopyMethod::kDma:
      EnqueueDma(work, result);
      break;
    case CopyMethod::kDirect:
      result->Ok(LaunchMove(work.move(), work.Some(0, n, nullptr), grid_, kernels_.get()),
                 "cudaLaunchKernel");
      break;
    case CopyMethod::kStaged:
      EnqueueStaged(work, result);
      break;
  }
  if (result->ok() && hashed) {
    result->Ok(LaunchSumUp(sums, static_cast<uint32_t>(n), layout.n_chunks(),
                           static_cast<uint64_t*>(its.accumulators.get()), kernels_.get()),
               "cudaLaunchKernel");
  }
  if (result->ok()) Order(copies_.get(), copied_, kernels_.get(), result);
  if (result->ok()) {
    result->Ok(cudaEventRecord(its.done.get(), kernels_.get()), "cudaEventRecord");
  }
}

void Transfer::EnqueueDma(const Work& work, CudaResult* result) {
  const bool hashed = work.sums != nullptr;
  // A store's blocks are hashed while they are copied; a load's as they arrive, some at a time.
  const bool by_chunks = hashed && work.way == CopyWay::kToDevice;
  const size_t at_a_time =
      by_chunks ? static_cast<size_t>(chunk_bytes_ / work.block_bytes()) : work.n;
  const auto hash = [&](size_t first, size_t count) {
    result->Ok(LaunchMove(Move::kHash, work.Some(first, count, nullptr), grid_, kernels_.get()),
               "cudaLaunchKernel");
  };
  if (hashed && !by_chunks) hash(0, work.n);
  std::vector<CopyRun> runs;
  for (size_t first = 0; first < work.n && result->ok(); first += at_a_time) {
    const size_t count = std::min(at_a_time, work.n - first);
    runs.clear();
    for (size_t i = first; i < first + count; ++i) {
      std::byte* row = work.Row(i);
      for (const Layer& layer : work.layout.blocks->layers) {
        AppendRun({layer.base + static_cast<uint64_t>(work.block_ids[i]) * layer.stride, row,
                   layer.piece},
                  &runs);
        row += layer.piece;
      }
    }
    CopyRuns(work.way, runs, result);
    if (!by_chunks || !result->ok()) continue;
    Order(copies_.get(), copied_, kernels_.get(), result);
    if (result->ok()) hash(first, count);
  }
}

void Transfer::EnqueueStaged(const Work& work, CudaResult* result) {
  const uint64_t bytes = work.block_bytes();
  const size_t at_a_time = static_cast<size_t>(chunk_bytes_ / bytes);
  std::vector<CopyRun> runs;
  for (size_t first = 0; first < work.n && result->ok(); first += at_a_time) {
    const size_t count = std::min(at_a_time, work.n - first);
    Chunk& chunk = ring_[next_chunk_];
    next_chunk_ = (next_chunk_ + 1) % kRing;
    auto* const staged = static_cast<std::byte*>(chunk.bytes.get());
    runs.clear();
    for (size_t i = 0; i < count; ++i) {
      AppendRun({staged + i * bytes, work.Row(first + i), bytes}, &runs);
    }
    const bool to_host = work.way == CopyWay::kToHost;
    const cudaStream_t filler = to_host ? kernels_.get() : copies_.get();
    const cudaStream_t emptier = to_host ? copies_.get() : kernels_.get();
    const auto move = [&] {
      result->Ok(LaunchMove(work.move(), work.Some(first, count, staged), grid_, kernels_.get()),
                 "cudaLaunchKernel");
    };
    // The chunk's former bytes have been fetched (an event that was never recorded is no wait).
    result->Ok(cudaStreamWaitEvent(filler, chunk.free.get(), 0), "cudaStreamWaitEvent");
    if (result->ok()) to_host ? move() : CopyRuns(work.way, runs, result);
    if (result->ok()) Order(filler, chunk.full, emptier, result);
    if (result->ok()) to_host ? CopyRuns(work.way, runs, result) : move();
    if (result->ok()) {
      result->Ok(cudaEventRecord(chunk.free.get(), emptier), "cudaEventRecord");
    }
  }
}

void Transfer::CopyRuns(CopyWay way, const std::vector<CopyRun>& runs, CudaResult* result) {
  const bool to_host = way == CopyWay::kToHost;
#if CUDART_VERSION >= 12080
  std::vector<void*> to;
  std::vector<void*> from;
  std::vector<size_t> bytes;
  for (const CopyRun& run : runs) {
    to.push_back(to_host ? run.host : run.device);
    from.push_back(to_host ? run.device : run.host);
    bytes.push_back(run.bytes);
  }
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;  // C1
  size_t from_first = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaMemcpyBatchAsync(to.data(), const_cast<const void**>(from.data()), bytes.data(),
                           bytes.size(), &attributes, &from_first, 1, copies_.get());
#else
  size_t failed = 0;
  const cudaError_t error =
      cudaMemcpyBatchAsync(to.data(), from.data(), bytes.data(), bytes.size(), &attributes,
                           &from_first, 1, &failed, copies_.get());
#endif
  result->Ok(error, "cudaMemcpyBatchAsync");
#else
  for (const CopyRun& run : runs) {
    void* const to = to_host ? run.host : run.device;
    const void* const from = to_host ? run.device : run.host;
    if (!result->Ok(cudaMemcpyAsync(to, from, run.bytes, cudaMemcpyDefault, copies_.get()),
                    "cudaMemcpyAsync")) {
      return;
    }
  }
#endif
}

void Transfer::Wait(size_t batch, CudaResult* result) {
  result->Ok(cudaEventSynchronize(batches_[batch].done.get()), "cudaEventSynchronize");
}

void Transfer::Drain() {
  // A stream that answers an error is dead with its context: it writes nothing any more (C3).
  static_cast<void>(cudaStreamSynchronize(copies_.get()));
  static_cast<void>(cudaStreamSynchronize(kernels_.get()));
}

}  // namespace kvmem
