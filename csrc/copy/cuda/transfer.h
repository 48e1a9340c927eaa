// Enqueues copies of blocks between a device's layers and rows of pinned host memory, with their
// XXH3-64, on streams of its own.
//
// Thread safety: one thread at a time. The current device is the streams'.
//
// Three ways, each best somewhere:
//   kDma     the copy engines move each piece: large pieces. No multiprocessor works for it.
//   kDirect  a kernel reads or writes the host's memory itself: small pieces of small blocks. Its
//            threads wait for the bus, on multiprocessors that a model's step could use.
//   kStaged  a kernel puts a block's pieces side by side in device memory, the copy engines move
//            it whole, chunk after chunk: small pieces of large blocks. The kernel runs for a
//            fraction of the time.
//
// Streams and events
//   - Copies go to `copies()`, kernels to `kernels()`; what one needs of the other it waits for by
//     an event. Begin() makes both wait for an event of the engine's stream (C1, C2).
//   - A batch is done when its event is: the rows may be read or given away then, and not before
//     (C3).
//
// Invariants
//   C1  A store reads a block after the step that wrote it: sources are read in stream order.
//   C2  A load writes a block after the steps that read what was there.
//   C3  Nobody is told of a batch before its event has passed; after a failure, before both
//       streams are idle.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "copy/copy_request.h"
#include "copy/cuda/kernels.h"
#include "copy/cuda/runtime.h"

namespace kvmem {

enum class CopyMethod : uint8_t { kDma = 0, kDirect = 1, kStaged = 2 };
enum class CopyWay : uint8_t { kToHost = 0, kToDevice = 1 };

// A group's layout and where its steps lie, in device memory.
struct DeviceLayout {
  const BlockLayout* blocks = nullptr;
  DeviceBytes steps;     // StepAddress[n_steps]; none where pieces are no multiples of 1,024 bytes
  uint32_t n_steps = 0;  // or not aligned: then only kDma moves them, and nothing is hashed here
  uint32_t step_kib = 0;

  bool even() const { return n_steps > 0; }
  uint32_t n_chunks() const { return n_steps * step_kib; }
};

// Where rows of blocks are in pinned memory.
struct HostRows {
  std::byte* base;
  uint64_t stride;
};

// One contiguous copy.
struct CopyRun {
  std::byte* device;
  std::byte* host;
  uint64_t bytes;
};

// Adds a copy, to the last one where it goes on from it on both sides.
void AppendRun(CopyRun run, std::vector<CopyRun>* runs);

class Transfer {
 public:
  static constexpr uint64_t kBatchBytes = uint64_t{256} << 20;
  static constexpr size_t kBatchItems = 8192;
  static constexpr uint64_t kChunkBytes = uint64_t{32} << 20;  // of a staged copy
  static constexpr size_t kRing = 3;
  static constexpr size_t kBatches = 2;  // in flight

  // `grid`: thread blocks of a kernel, at most.
  Transfer(unsigned grid, CudaResult* result);

  // Memory for batches of blocks of this layout; what is there already stays when it is enough.
  // REQUIRES: nothing is in flight.
  void MakeRoom(const BlockLayout& blocks, CudaResult* result);
  // Blocks of a batch at most.
  static size_t ItemsOf(const BlockLayout& blocks);

  // What is enqueued from now on comes after what is on `after` now.
  void Begin(cudaStream_t after, CudaResult* result);

  // Enqueues n <= ItemsOf(bytes of a block) copies: block_ids[i] to or from row row_ids[i]. With
  // `hashed`, Accumulators(batch) has them after Wait(batch). The ids are read before it returns.
  // REQUIRES: layout.even() unless method is kDma and hashed is false; the batch is not in flight;
  // the destinations differ.
  void Enqueue(size_t batch, const DeviceLayout& layout, CopyMethod method, CopyWay way,
               const HostRows& rows, const int32_t* block_ids, const int32_t* row_ids, size_t n,
               bool hashed, CudaResult* result);

  // Until the batch is done.
  void Wait(size_t batch, CudaResult* result);
  // Until nothing is in flight, whatever failed before.
  void Drain();
  const uint64_t* Accumulators(size_t batch) const {
    return static_cast<const uint64_t*>(batches_[batch].accumulators.get());
  }

  cudaStream_t kernels() const { return kernels_.get(); }
  cudaStream_t copies() const { return copies_.get(); }

 private:
  struct Batch {
    PinnedBytes host_ids;  // int32 block_ids[kBatchItems], row_ids[kBatchItems]
    DeviceBytes ids;
    DeviceBytes sums;
    PinnedBytes accumulators;
    CudaEvent done;
  };
  struct Chunk {
    DeviceBytes bytes;
    CudaEvent full;
    CudaEvent free;
  };

  struct Work;
  void EnqueueDma(const Work& work, CudaResult* result);
  void EnqueueStaged(const Work& work, CudaResult* result);
  void CopyRuns(CopyWay way, const std::vector<CopyRun>& runs, CudaResult* result);
  // `later` waits for what is on `earlier` now.
  void Order(cudaStream_t earlier, const CudaEvent& event, cudaStream_t later, CudaResult* result);

  const unsigned grid_;
  CudaStream kernels_;
  CudaStream copies_;
  CudaEvent entry_;
  CudaEvent copied_;
  std::array<Batch, kBatches> batches_;
  std::array<Chunk, kRing> ring_;
  uint64_t sum_bytes_ = 0;    // of a batch's sums
  uint64_t chunk_bytes_ = 0;  // of a chunk of the ring
  size_t next_chunk_ = 0;
};

// The steps of a layout, in device memory.
DeviceLayout PutOnDevice(const BlockLayout& blocks, CudaResult* result);

}  // namespace kvmem
