#include "copy/cuda/kernels.h"
#include "hash/xxh3_stream.h"

namespace kvmem {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kSumThreads = 64;  // few, with many registers each
constexpr uint32_t kWarp = 32;
constexpr uint32_t kEveryLane = 0xffffffffU;
constexpr uint64_t kPrime32 = kXxh3Prime32;
// Where the input's last stripe takes its secret (XXH3: seven bytes before the scramble's).
constexpr uint32_t kLastStripeOffset = kXxh3ScrambleOffset - 7;

// In a kernel's parameters: the device has no symbol of it.
struct Secret {
  unsigned char bytes[kXxh3SecretBytes];
};

struct Start {
  uint64_t acc[8];
};

__device__ uint64_t SecretAt(const Secret& secret, uint32_t offset) {
  uint64_t value = 0;
  for (uint32_t i = 0; i < 8; ++i) {
    value |= static_cast<uint64_t>(secret.bytes[offset + i]) << (8 * i);
  }
  return value;
}

__device__ uint64_t Low64(const uint4& v) { return (static_cast<uint64_t>(v.y) << 32) | v.x; }
__device__ uint64_t High64(const uint4& v) { return (static_cast<uint64_t>(v.w) << 32) | v.z; }

__device__ uint64_t Product(uint64_t keyed) {
  return static_cast<uint64_t>(static_cast<uint32_t>(keyed)) * (keyed >> 32);
}

// A lane holds 16 bytes of a stripe: two of its eight words, which go to two accumulators.
struct Pair {
  uint64_t low;
  uint64_t high;

  __device__ void Add(const uint4& v, const Pair& key) {
    const uint64_t a = Low64(v);
    const uint64_t b = High64(v);
    low += b + Product(a ^ key.low);
    high += a + Product(b ^ key.high);
  }
};

__device__ Pair KeyAt(const Secret& secret, uint32_t offset) {
  return {SecretAt(secret, offset), SecretAt(secret, offset + 8)};
}

// A warp takes a step at a time. Lane l has bytes [16 l, 16 l + 16) of every 512: stripe l / 4 of
// eight, words 2 (l % 4) and the next.
template <uint32_t kKiB, Move kMove, bool kHashed>
__global__ void __launch_bounds__(kThreads)
    MoveSteps(const __grid_constant__ MoveBatch batch, const __grid_constant__ Secret secret) {
  constexpr uint32_t kLoads = 2 * kKiB;
  const uint32_t lane = threadIdx.x % kWarp;
  const uint32_t warp = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  const uint32_t n_warps = gridDim.x * kThreads / kWarp;
  const uint32_t n_units = batch.n_items * batch.n_steps;
  const uint32_t n_chunks = batch.n_steps * kKiB;
  const uint32_t word = 16 * (lane % 4);
  Pair first_half = {}, second_half = {}, very_last = {};
  if constexpr (kHashed) {
    first_half = KeyAt(secret, 8 * (lane / 4) + word);
    second_half = KeyAt(secret, 8 * (8 + lane / 4) + word);
    very_last = lane / 4 == 7 ? KeyAt(secret, kLastStripeOffset + word) : second_half;
  }
  for (uint32_t unit = warp; unit < n_units; unit += n_warps) {
    const uint32_t item = unit / batch.n_steps;
    const uint32_t step = unit - item * batch.n_steps;
    const StepAddress at = batch.steps[step];
    auto* const block = reinterpret_cast<uint4*>(
        at.base + static_cast<uint64_t>(batch.block_ids[item]) * at.stride);
    uint4* row = nullptr;
    if constexpr (kMove != Move::kHash) {
      const uint64_t index =
          batch.row_ids != nullptr ? static_cast<uint64_t>(batch.row_ids[item]) : item;
      row = reinterpret_cast<uint4*>(batch.rows + index * batch.row_stride +
                                     static_cast<uint64_t>(step) * (kKiB * 1024));
    }
    const uint4* const from = kMove == Move::kScatter ? row : block;
    uint4 values[kLoads];
#pragma unroll
    for (uint32_t k = 0; k < kLoads; ++k) values[k] = __ldcs(from + k * kWarp + lane);
    if constexpr (kMove != Move::kHash) {
      uint4* const to = kMove == Move::kScatter ? block : row;
#pragma unroll
      for (uint32_t k = 0; k < kLoads; ++k) __stcs(to + k * kWarp + lane, values[k]);
    }
    if constexpr (kHashed) {
#pragma unroll
      for (uint32_t kib = 0; kib < kKiB; ++kib) {
        const uint32_t chunk = step * kKiB + kib;
        Pair sum = {0, 0};
        sum.Add(values[2 * kib], first_half);
        sum.Add(values[2 * kib + 1], chunk + 1 == n_chunks ? very_last : second_half);
#pragma unroll
        for (uint32_t apart = 4; apart < kWarp; apart *= 2) {
          sum.low += __shfl_xor_sync(kEveryLane, sum.low, apart);
          sum.high += __shfl_xor_sync(kEveryLane, sum.high, apart);
        }
        if (lane < 4) {
          uint64_t* const out =
              batch.sums + (static_cast<uint64_t>(item) * n_chunks + chunk) * 8 + 2 * lane;
          out[0] = sum.low;
          out[1] = sum.high;
        }
      }
    }
  }
}

constexpr uint32_t kAhead = 24;

// The sums of chunks [chunk, chunk + kAhead) of one accumulator, as far as there are any.
__device__ void Fetch(const uint64_t* its, uint32_t chunk, uint32_t n_chunks,
                      uint64_t (&values)[kAhead]) {
#pragma unroll
  for (uint32_t k = 0; k < kAhead; ++k) {
    if (chunk + k < n_chunks) values[k] = __ldcg(its + static_cast<uint64_t>(chunk + k) * 8);
  }
}

// A thread has one accumulator of one item.
__global__ void __launch_bounds__(kSumThreads)
    SumUp(const uint64_t* sums, uint32_t n_items, uint32_t n_chunks, uint64_t* accumulators,
          const __grid_constant__ Start start, const __grid_constant__ Secret secret) {
  const uint32_t thread = blockIdx.x * kSumThreads + threadIdx.x;
  const uint32_t item = thread / 8;
  const uint32_t i = thread % 8;
  if (item >= n_items) return;
  const uint64_t key = SecretAt(secret, kXxh3ScrambleOffset + 8 * i);
  const uint64_t* const its = sums + static_cast<uint64_t>(item) * n_chunks * 8 + i;
  // The chain is serial and short; what it adds is fetched while the chunks before go through it.
  uint64_t now[kAhead];
  uint64_t next[kAhead];
  Fetch(its, 0, n_chunks, now);
  uint64_t acc = start.acc[i];
  for (uint32_t chunk = 0; chunk < n_chunks; chunk += kAhead) {
    Fetch(its, chunk + kAhead, n_chunks, next);
#pragma unroll
    for (uint32_t k = 0; k < kAhead; ++k) {
      if (chunk + k < n_chunks) acc += now[k];
      if (chunk + k + 1 < n_chunks) acc = (acc ^ (acc >> 47) ^ key) * kPrime32;
      now[k] = next[k];
    }
  }
  accumulators[item * 8 + i] = acc;
}

Secret TheSecret() {
  Secret secret;
  for (size_t i = 0; i < kXxh3SecretBytes; ++i) secret.bytes[i] = kXxh3Secret[i];
  return secret;
}

using Kernel = void (*)(MoveBatch, Secret);

template <uint32_t kKiB, bool kHashed>
Kernel KernelOf(Move move) {
  switch (move) {
    case Move::kGather:
      return MoveSteps<kKiB, Move::kGather, kHashed>;
    case Move::kScatter:
      return MoveSteps<kKiB, Move::kScatter, kHashed>;
    default:
      return MoveSteps<kKiB, Move::kHash, true>;
  }
}

}  // namespace

cudaError_t LaunchMove(Move move, const MoveBatch& batch, unsigned grid, cudaStream_t stream) {
  const bool hashed = batch.sums != nullptr;
  const Kernel kernel = batch.step_kib == 4
                            ? (hashed ? KernelOf<4, true>(move) : KernelOf<4, false>(move))
                            : (hashed ? KernelOf<1, true>(move) : KernelOf<1, false>(move));
  MoveBatch its = batch;
  Secret secret = TheSecret();
  void* arguments[] = {&its, &secret};
  // Its own answer: cudaGetLastError() would take and clear an older error of the engine's.
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads),
                          arguments, 0, stream);
}

cudaError_t LaunchSumUp(const uint64_t* sums, uint32_t n_items, uint32_t n_chunks,
                        uint64_t* accumulators, cudaStream_t stream) {
  Start start;
  Xxh3Begin(start.acc);
  Secret secret = TheSecret();
  void* arguments[] = {&sums, &n_items, &n_chunks, &accumulators, &start, &secret};
  const unsigned grid = (n_items * 8 + kSumThreads - 1) / kSumThreads;
  return cudaLaunchKernel(reinterpret_cast<const void*>(&SumUp), dim3(grid), dim3(kSumThreads),
                          arguments, 0, stream);
}

}  // namespace kvmem
