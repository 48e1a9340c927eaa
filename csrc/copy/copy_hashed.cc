#include "copy/copy_hashed.h"

#include <algorithm>

#include "hash/xxh3_stream.h"

namespace kvmem {
namespace {

constexpr size_t kStageBytes = 16384;  // stays in the first-level cache
constexpr size_t kAlign = 64;          // that copy_add asks of its destination

}  // namespace

uint64_t CopyHashed(const CopyKernels& kernels, std::byte* dst, const std::byte* src, uint64_t n) {
  Xxh3Stream hash(n);
  uint64_t done = 0;
  if (kernels.copy_add != nullptr && n > kXxh3Block && n % kXxh3Block == 0 &&
      reinterpret_cast<uintptr_t>(dst) % kAlign == 0) {
    // The hash's last block is not like the others.
    done = n - kXxh3Block;
    const CopyLane lane = {dst, src, hash.accumulators()};
    kernels.copy_add(&lane, 1, done);
    hash.SkipBlocks(done / kXxh3Block);
  }
  alignas(64) std::byte stage[kStageBytes];
  while (done < n) {
    const size_t step = static_cast<size_t>(std::min<uint64_t>(kStageBytes, n - done));
    CopyShared(stage, src + done, step);
    hash.Update(stage, step);
    kernels.copy(dst + done, stage, step);
    done += step;
  }
  return hash.Digest();
}

}  // namespace kvmem
