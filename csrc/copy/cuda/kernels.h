// The kernels of the copier: pieces of blocks to and from flat rows, and XXH3-64 on the way.
//
// Thread safety: the launchers keep nothing. The current device is the stream's. Work is enqueued
// and not waited for; every pointer must be readable by the device until it is done.
//
// XXH3 adds the sixteen stripes of a block of 1,024 bytes to eight accumulators and then scrambles
// them. Adding is commutative: the sums of all blocks are made at once, by the threads that move
// the bytes; only the scrambling goes block by block, over 64 bytes for each 1,024.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace kvmem {

// [step, step + kStepBytes) of every block lies at base + block * stride on the device.
struct StepAddress {
  std::byte* base;
  uint64_t stride;
};

enum class Move { kGather, kScatter, kHash };  // blocks to rows, rows to blocks, blocks looked at

struct MoveBatch {
  const StepAddress* steps;  // n_steps
  uint32_t n_steps;
  uint32_t step_kib;         // 1 or 4
  const int32_t* block_ids;  // n_items
  // Item i's bytes lie at rows + row_ids[i] * row_stride, or at rows + i * row_stride.
  const int32_t* row_ids;
  std::byte* rows;
  uint64_t row_stride;
  uint32_t n_items;
  // [n_items][n_steps * step_kib][8], or null: no hash.
  uint64_t* sums;
};

// Needs addresses that are multiples of 16. REQUIRES: n_items * n_steps < 2^32.
cudaError_t LaunchMove(Move move, const MoveBatch& batch, unsigned grid, cudaStream_t stream);

// accumulators[i][8] from the sums of n_chunks blocks of 1,024 bytes, before the final mixing.
cudaError_t LaunchSumUp(const uint64_t* sums, uint32_t n_items, uint32_t n_chunks,
                        uint64_t* accumulators, cudaStream_t stream);

}  // namespace kvmem
