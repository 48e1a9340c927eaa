// One contiguous copy whose XXH3-64 is taken on the way, in one pass over the bytes.
//
// Thread safety: pure but for the destination.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy/cpu/kernels.h"

namespace kvmem {

// Copies n bytes and returns the digest of what was written. The stores may be non-temporal:
// kernels.fence() before the bytes are announced.
uint64_t CopyHashed(const CopyKernels& kernels, std::byte* dst, const std::byte* src, uint64_t n);

}  // namespace kvmem
