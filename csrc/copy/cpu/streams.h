// The kernels' loops, written once over a vector type. Only the kernels_*.cc files include this;
// each defines KVMEM_TARGET, the function attribute that lets the compiler use its instructions.
//
// A vector type V has: Reg, kBytes, Load (unaligned), Stream (non-temporal, aligned),
// and for the hash Add, Scramble as XXH3 defines them on 64-bit lanes.
#pragma once

#if !defined(KVMEM_TARGET)
#error "define KVMEM_TARGET before including this file"
#endif

#include <immintrin.h>

#include <cstring>

#include "copy/cpu/kernels.h"
#include "hash/xxh3_stream.h"

namespace kvmem::internal {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kStreams = kCopyStreams;
constexpr size_t kRun = kCopyRun;

template <class V>
KVMEM_TARGET inline void StreamRun(std::byte* dst, const std::byte* src) {
#pragma GCC unroll 8
  for (size_t at = 0; at < kRun; at += V::kBytes) V::Stream(dst + at, V::Load(src + at));
}

template <class V>
KVMEM_TARGET void StreamCopy(std::byte* dst, const std::byte* src, size_t bytes) {
  if (bytes < kStreamBytes) {
    std::memcpy(dst, src, bytes);
    return;
  }
  // Non-temporal stores need an aligned destination: [0, head) goes by memcpy.
  const size_t head = -reinterpret_cast<uintptr_t>(dst) % kLine;
  std::memcpy(dst, src, head);
  dst += head;
  src += head;
  bytes -= head;
  // [0, kStreams * part) in streams, then whole lines, then the tail.
  const size_t part = StreamPart(bytes);
  for (size_t at = 0; at < part; at += kRun) {
#pragma GCC unroll 8
    for (size_t k = 0; k < kStreams; ++k) {
      StreamRun<V>(dst + k * part + at, src + k * part + at);
    }
  }
  size_t at = kStreams * part;
  for (; at + kLine <= bytes; at += kLine) {
    for (size_t b = 0; b < kLine; b += V::kBytes) V::Stream(dst + at + b, V::Load(src + at + b));
  }
  std::memcpy(dst + at, src + at, bytes - at);
}

// Lanes in step, one 1,024-byte block of each at a time; every run of kRun bytes is loaded, stored
// and added before the next lane's turn.
template <class V, int kLanes>
KVMEM_TARGET void CopyAddLanes(const CopyLane* lanes, size_t bytes) {
  constexpr size_t kParts = kXxh3Stripe / V::kBytes;
  constexpr size_t kRunStripes = kRun / kXxh3Stripe;
  typename V::Reg acc[kLanes][kParts];
  for (int k = 0; k < kLanes; ++k) {
    for (size_t p = 0; p < kParts; ++p) {
      acc[k][p] =
          V::Load(reinterpret_cast<const std::byte*>(lanes[k].accumulators) + p * V::kBytes);
    }
  }
  const auto* secret = reinterpret_cast<const std::byte*>(kXxh3Secret);
  for (size_t block = 0; block < bytes; block += kXxh3Block) {
    for (size_t first = 0; first < kXxh3Block / kXxh3Stripe; first += kRunStripes) {
#pragma GCC unroll 4
      for (int k = 0; k < kLanes; ++k) {
#pragma GCC unroll 4
        for (size_t stripe = first; stripe < first + kRunStripes; ++stripe) {
          const size_t at = block + stripe * kXxh3Stripe;
#pragma GCC unroll 2
          for (size_t p = 0; p < kParts; ++p) {
            const typename V::Reg value = V::Load(lanes[k].src + at + p * V::kBytes);
            V::Stream(lanes[k].dst + at + p * V::kBytes, value);
            const typename V::Reg key = V::Load(secret + 8 * stripe + p * V::kBytes);
            acc[k][p] = V::Add(acc[k][p], value, key);
          }
        }
      }
    }
    for (int k = 0; k < kLanes; ++k) {
      for (size_t p = 0; p < kParts; ++p) {
        acc[k][p] = V::Scramble(acc[k][p], V::Load(secret + kXxh3ScrambleOffset + p * V::kBytes));
      }
    }
  }
  for (int k = 0; k < kLanes; ++k) {
    for (size_t p = 0; p < kParts; ++p) {
      V::Store(reinterpret_cast<std::byte*>(lanes[k].accumulators) + p * V::kBytes, acc[k][p]);
    }
  }
}

template <class V>
KVMEM_TARGET void CopyAdd(const CopyLane* lanes, int n_lanes, size_t bytes) {
  static_assert(kMaxLanes == 4, "one case per number of lanes");
  switch (n_lanes) {
    case 1:
      return CopyAddLanes<V, 1>(lanes, bytes);
    case 2:
      return CopyAddLanes<V, 2>(lanes, bytes);
    case 3:
      return CopyAddLanes<V, 3>(lanes, bytes);
    default:
      return CopyAddLanes<V, 4>(lanes, bytes);
  }
}

inline void StoreFence() { _mm_sfence(); }

}  // namespace
}  // namespace kvmem::internal
