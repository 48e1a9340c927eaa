// Moves KV blocks between a GPU's layers and pinned host slots, in batches and in stream order.
//
// State: compiled by the project's build for sm_80, sm_90 (from CUDA 11.8) and sm_100 (from 12.8);
// not yet run on a GPU, and nothing calls it yet.
//
// Thread safety: the functions keep no state between calls and may be called from any thread; the
// current device of the calling thread must be the one the stream belongs to.
//
// Streams and events
//   - All copies go to the caller's stream and are finished when the work enqueued there is. It
//     must be a created stream, never the legacy null stream nor a per-thread default one.
//   - A store reads blocks that a model's step writes: the caller makes the stream wait for an
//     event recorded on the compute stream after that step. Sources are read in stream order, so
//     nothing is read before that event (C1).
//   - A load writes blocks that a step reads: the caller makes the compute stream wait for an
//     event recorded on this stream after the load (C2).
//   - Host slots may be announced (stores) or reused (loads) only when an event recorded on this
//     stream after the call has completed (C3); checksums are the caller's, taken after that.
//   - A call that does not answer kOk may have enqueued some of its copies: C1 to C3 still hold
//     for all of them, and the bytes of all its blocks are undefined.
//
// Invariants
//   C1-C3 above.
//   C4  No address outside the registered layers and slots is formed: every id is checked first,
//       and with a bad one nothing is enqueued.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace kvmem {

enum class CudaCopyStatus : int {
  kOk = 0,
  kBadStream = 1,    // the null stream, or a default one
  kBadGeometry = 2,  // no layers, a piece larger than its stride, or slots smaller than the pieces
  kRange = 3,        // no such block or slot; nothing was enqueued
  kOutOfMemory = 4,  // of the host, for the batch's lists
  kCuda = 5,         // *error says what
};

enum class CudaDirection : int { kDeviceToHost, kHostToDevice };

// One layer on the device: block i is piece bytes at base + i * stride.
struct CudaLayer {
  std::byte* base;
  uint64_t stride;
  uint64_t piece;
};

// The slots in pinned (page-locked, portable or registered) host memory, mapped into the device's
// address space at the same addresses (unified addressing): a block's pieces side by side.
struct CudaSlots {
  std::byte* base;
  uint64_t stride;
  uint64_t n_slots;
};

struct CudaCopyBatch {
  const CudaLayer* layers;
  size_t n_layers;
  uint64_t n_blocks;
  CudaSlots slots;
  // n ids each, in host memory, read before the call returns. Within a batch the destinations
  // differ: copies of one batch have no order among themselves.
  const int32_t* block_ids;
  const int32_t* slot_ids;
  size_t n;
};

// Pieces from this size on go to the copy engines; smaller ones to a kernel, because a copy
// engine's fixed cost for each piece would be most of its time.
inline constexpr uint64_t kCopyEngineBytes = 32768;

// Enqueues the batch. `error` gets the CUDA error with kCuda, else cudaSuccess.
CudaCopyStatus EnqueueCopy(const CudaCopyBatch& batch, CudaDirection direction, cudaStream_t stream,
                           cudaError_t* error) noexcept;

}  // namespace kvmem
