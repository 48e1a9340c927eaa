#include "copy/cpu/kernels.h"

#include <atomic>
#include <cstring>

namespace kvmem {

#if defined(__SANITIZE_THREAD__)

// The real kernels race by design where a slot is reused under a reader, and the descriptor
// tells. TSan must see the protocol, not that: words are atomic here.
void CopyShared(std::byte* dst, const std::byte* src, size_t bytes) {
  size_t at = 0;
  const auto both = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src);
  if (both % sizeof(uint64_t) == 0) {
    for (; at + sizeof(uint64_t) <= bytes; at += sizeof(uint64_t)) {
      const auto word =
          __atomic_load_n(reinterpret_cast<const uint64_t*>(src + at), __ATOMIC_ACQUIRE);
      __atomic_store_n(reinterpret_cast<uint64_t*>(dst + at), word, __ATOMIC_RELEASE);
    }
  }
  for (; at < bytes; ++at) {
    const auto byte =
        __atomic_load_n(reinterpret_cast<const unsigned char*>(src + at), __ATOMIC_ACQUIRE);
    __atomic_store_n(reinterpret_cast<unsigned char*>(dst + at), byte, __ATOMIC_RELEASE);
  }
}

#else

void CopyShared(std::byte* dst, const std::byte* src, size_t bytes) {
  std::memcpy(dst, src, bytes);
}

#endif

namespace internal {
namespace {

void PlainFence() {
#if !defined(__SANITIZE_THREAD__)
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace

const CopyKernels kPlainKernels = {CpuPath::kPlain, CopyShared, nullptr, PlainFence};

}  // namespace internal

const CopyKernels& KernelsFor(CpuPath path) {
#if defined(KVMEM_X86_KERNELS)
  switch (path) {
    case CpuPath::kAvx512:
      return internal::kAvx512Kernels;
    case CpuPath::kAvx2:
      return internal::kAvx2Kernels;
    case CpuPath::kPlain:
      break;
  }
#else
  static_cast<void>(path);
#endif
  return internal::kPlainKernels;
}

}  // namespace kvmem
