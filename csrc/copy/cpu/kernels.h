// The inner loops of block copy, one set per kind of CPU.
//
// Thread safety: every function may be called from any thread; none keeps state.
//
// Why these shapes (single thread, 2 GiB of 96 KiB pieces drawn at random, Sapphire-Rapids class):
//   - The destination is non-temporal. A plain store first reads the line it is about to replace,
//     a third of all traffic: memcpy 7.2 GB/s, one non-temporal stream 9.4.
//   - Eight streams, a piece's eighths in turn. The hardware prefetcher follows each and stops at
//     the page's end, so one stream waits at every page and eight do not: 13.2 GB/s.
//   - Runs of four lines per stream and turn; one or two lines lose up to 4 %.
//   - The heads of the next piece's streams are prefetched before a piece is copied: 12 KiB pieces
//     from 7.5 to 9.1 GB/s, 64 KiB from 10.7 to 10.9, larger ones no gain.
//   - No software prefetch within a piece: 512 to 4,096 bytes ahead gained nothing on four and
//   eight streams and
//     lost up to 15 % on 12 KiB pieces; PREFETCHNTA fell to 5 GB/s.
//   - Below 4 KiB the set-up costs more than the read for ownership: memcpy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "support/cpu.h"

namespace kvmem {

// Pieces smaller than this are copied by memcpy.
inline constexpr size_t kStreamBytes = 4096;
inline constexpr size_t kCopyStreams = 8;
inline constexpr size_t kCopyRun = 256;  // bytes of one stream before the next one's turn
// Slots that CopyAdd moves in step; four keep the memory as busy as eight (12.7 GB/s against 12.5)
// and leave the registers to the hashing.
inline constexpr int kMaxLanes = 4;

// One slot's part in CopyAdd.
struct CopyLane {
  std::byte* dst;
  const std::byte* src;
  uint64_t* accumulators;  // of an Xxh3Stream, eight of them, 64-byte aligned
};

struct CopyKernels {
  CpuPath path;

  // Copies one piece; any size and alignment. The stores may be non-temporal: Fence() before the
  // bytes are announced.
  void (*copy)(std::byte* dst, const std::byte* src, size_t bytes);

  // Copies `bytes` in every lane, the lanes in step, and adds each lane's blocks to its hash from
  // the very registers that are stored: what is hashed is what was written, whatever becomes of
  // the source meanwhile. Null where the CPU has no such kernel.
  // REQUIRES: 1 <= n_lanes <= kMaxLanes; bytes a multiple of 1,024; every dst 64-byte aligned.
  void (*copy_add)(const CopyLane* lanes, int n_lanes, size_t bytes);

  // Orders all earlier stores of this thread, non-temporal ones too, before all later ones.
  void (*fence)();
};

// REQUIRES: path <= DetectCpu().
const CopyKernels& KernelsFor(CpuPath path);

// Moves bytes that another process may be changing meanwhile; the caller finds that out
// afterwards. Built for ThreadSanitizer it is made of atomic words.
void CopyShared(std::byte* dst, const std::byte* src, size_t bytes);

// Bytes of each stream of a piece: an odd number of runs, so that the eight are never at one place
// of their pages. On an EPYC (Zen 3) they then evict one another: 64 KiB, 96 KiB and 2 MiB pieces
// in even eighths got 6 GB/s where 360 KiB ones got 15.
inline size_t StreamPart(size_t bytes) {
  const size_t runs = bytes / (kCopyStreams * kCopyRun);
  return (runs - (runs + 1) % 2) * kCopyRun;
}

// Starts the reads of the piece that is copied next. Inlined early: GCC 12 takes a function of
// prefetches only for one without effect and drops its calls.
[[gnu::always_inline]] inline void PrefetchPiece(const std::byte* src, size_t bytes) {
  if (bytes < kStreamBytes) return;
  const size_t part = StreamPart(bytes);
  // Two lines of each head; four are more than a small piece's copy leaves time for.
  const size_t ahead = bytes < 32768 ? 128 : kCopyRun;
  for (size_t at = 0; at < ahead; at += 64) {
    for (size_t k = 0; k < kCopyStreams; ++k) __builtin_prefetch(src + k * part + at);
  }
}

namespace internal {
extern const CopyKernels kPlainKernels;
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define KVMEM_X86_KERNELS 1
extern const CopyKernels kAvx2Kernels;
extern const CopyKernels kAvx512Kernels;
#endif
}  // namespace internal

}  // namespace kvmem
