#include <algorithm>
#include <exception>
#include <vector>

#include "copy/cuda/block_copier.h"

namespace kvmem {
namespace {

constexpr int kThreads = 256;
// A copy waits for the bus, not for arithmetic: more blocks would take multiprocessors from the
// model's step and move no more bytes.
constexpr size_t kMaxGrid = 32;
// Copies of one launch, passed in its parameter space (4 KiB): the lists need no device memory,
// whose lifetime would reach past the call.
constexpr size_t kLaunchCopies = 160;

struct Copy {
  std::byte* dst;
  const std::byte* src;
  size_t bytes;
};

struct LaunchCopies {
  uint32_t n;
  Copy copies[kLaunchCopies];
};
static_assert(sizeof(LaunchCopies) <= 4096, "a kernel's parameters");

template <class Word>
__device__ void CopyWords(const Copy& copy, size_t* done) {
  const size_t n = copy.bytes / sizeof(Word);
  auto* const dst = reinterpret_cast<Word*>(copy.dst);
  const auto* const src = reinterpret_cast<const Word*>(copy.src);
  for (size_t i = threadIdx.x; i < n; i += blockDim.x) dst[i] = src[i];
  *done = n * sizeof(Word);
}

// One thread block takes a piece at a time, in the widest words that both sides are aligned for.
__global__ void __launch_bounds__(kThreads) CopyPieces(const __grid_constant__ LaunchCopies list) {
  for (uint32_t i = blockIdx.x; i < list.n; i += gridDim.x) {
    const Copy copy = list.copies[i];
    const auto both = reinterpret_cast<uintptr_t>(copy.dst) | reinterpret_cast<uintptr_t>(copy.src);
    size_t done = 0;
    if (both % sizeof(uint4) == 0) {
      CopyWords<uint4>(copy, &done);
    } else if (both % sizeof(uint32_t) == 0) {
      CopyWords<uint32_t>(copy, &done);
    }
    // [done, bytes)  the tail, or all of an unaligned piece
    for (size_t at = done + threadIdx.x; at < copy.bytes; at += blockDim.x) {
      copy.dst[at] = copy.src[at];
    }
  }
}

CudaCopyStatus Check(const CudaCopyBatch& batch, cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread) {
    return CudaCopyStatus::kBadStream;
  }
  if (batch.n_layers == 0 || batch.slots.base == nullptr) return CudaCopyStatus::kBadGeometry;
  uint64_t slot_bytes = 0;
  for (size_t k = 0; k < batch.n_layers; ++k) {
    const CudaLayer& layer = batch.layers[k];
    const bool holds = layer.base != nullptr && layer.piece > 0 && layer.piece <= layer.stride &&
                       layer.piece <= batch.slots.stride - slot_bytes;
    if (!holds) return CudaCopyStatus::kBadGeometry;
    slot_bytes += layer.piece;
  }
  for (size_t i = 0; i < batch.n; ++i) {  // C4
    if (batch.block_ids[i] < 0 || batch.slot_ids[i] < 0) return CudaCopyStatus::kRange;
    if (static_cast<uint64_t>(batch.block_ids[i]) >= batch.n_blocks ||
        static_cast<uint64_t>(batch.slot_ids[i]) >= batch.slots.n_slots) {
      return CudaCopyStatus::kRange;
    }
  }
  return CudaCopyStatus::kOk;
}

// Calls visit(Copy) for every piece of every block.
template <class Visit>
void ForEachPiece(const CudaCopyBatch& batch, CudaDirection direction, Visit visit) {
  for (size_t i = 0; i < batch.n; ++i) {
    std::byte* slot =
        batch.slots.base + static_cast<uint64_t>(batch.slot_ids[i]) * batch.slots.stride;
    for (size_t k = 0; k < batch.n_layers; ++k) {
      const CudaLayer& layer = batch.layers[k];
      std::byte* const block =
          layer.base + static_cast<uint64_t>(batch.block_ids[i]) * layer.stride;
      const bool to_host = direction == CudaDirection::kDeviceToHost;
      visit(Copy{to_host ? slot : block, to_host ? block : slot, layer.piece});
      slot += layer.piece;
    }
  }
}

// Small pieces, some hundred a launch.
cudaError_t LaunchSmall(const std::vector<Copy>& small, cudaStream_t stream) {
  for (size_t first = 0; first < small.size(); first += kLaunchCopies) {
    LaunchCopies list = {};
    list.n = static_cast<uint32_t>(std::min(kLaunchCopies, small.size() - first));
    std::copy_n(small.begin() + static_cast<std::ptrdiff_t>(first), list.n, list.copies);
    const auto grid = static_cast<unsigned>(std::min<size_t>(list.n, kMaxGrid));
    void* arguments[] = {&list};
    // Its own answer: cudaGetLastError() would take and clear an older error of the engine's.
    const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(&CopyPieces),
                                               dim3(grid), dim3(kThreads), arguments, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Large pieces, in one call where the runtime has it: CUDA 13's signature (12.8's had a failIdx
// before the stream; there the pieces go one by one).
struct LargeCopies {
  std::vector<void*> dst;
  std::vector<const void*> src;
  std::vector<size_t> bytes;

  cudaError_t Enqueue(cudaStream_t stream) const {
    if (dst.empty()) return cudaSuccess;
#if CUDART_VERSION >= 13000
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;  // C1
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t from_first = 0;
    return cudaMemcpyBatchAsync(dst.data(), src.data(), bytes.data(), dst.size(), &attributes,
                                &from_first, 1, stream);
#else
    for (size_t i = 0; i < dst.size(); ++i) {
      const cudaError_t error =
          cudaMemcpyAsync(dst[i], src[i], bytes[i], cudaMemcpyDefault, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
#endif
  }
};

cudaError_t EnqueueAll(const CudaCopyBatch& batch, CudaDirection direction, cudaStream_t stream) {
  size_t n_small = 0;
  for (size_t k = 0; k < batch.n_layers; ++k) n_small += batch.layers[k].piece < kCopyEngineBytes;
  std::vector<Copy> small;
  small.reserve(n_small * batch.n);
  LargeCopies large;
  const size_t n_large = (batch.n_layers - n_small) * batch.n;
  large.dst.reserve(n_large);
  large.src.reserve(n_large);
  large.bytes.reserve(n_large);
  ForEachPiece(batch, direction, [&](const Copy& copy) {
    if (copy.bytes < kCopyEngineBytes) {
      small.push_back(copy);
    } else {
      large.dst.push_back(copy.dst);
      large.src.push_back(copy.src);
      large.bytes.push_back(copy.bytes);
    }
  });
  const cudaError_t error = large.Enqueue(stream);
  return error != cudaSuccess ? error : LaunchSmall(small, stream);
}

}  // namespace

CudaCopyStatus EnqueueCopy(const CudaCopyBatch& batch, CudaDirection direction, cudaStream_t stream,
                           cudaError_t* error) noexcept {
  *error = cudaSuccess;
  const CudaCopyStatus checked = Check(batch, stream);
  if (checked != CudaCopyStatus::kOk || batch.n == 0) return checked;
  try {
    *error = EnqueueAll(batch, direction, stream);
  } catch (const std::exception&) {  // the lists are made before anything is enqueued
    return CudaCopyStatus::kOutOfMemory;
  }
  return *error == cudaSuccess ? CudaCopyStatus::kOk : CudaCopyStatus::kCuda;
}

}  // namespace kvmem
