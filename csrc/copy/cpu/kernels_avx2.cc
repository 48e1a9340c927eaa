#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)

#define KVMEM_TARGET __attribute__((target("avx2")))
#include "copy/cpu/streams.h"

namespace kvmem::internal {
namespace {

struct Avx2 {
  using Reg = __m256i;
  static constexpr size_t kBytes = 32;

  KVMEM_TARGET static inline Reg Load(const std::byte* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  KVMEM_TARGET static inline void Store(std::byte* to, Reg value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
  }
  KVMEM_TARGET static inline void Stream(std::byte* to, Reg value) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), value);
  }
  KVMEM_TARGET static inline Reg Add(Reg acc, Reg value, Reg secret) {
    const Reg key = _mm256_xor_si256(value, secret);
    const Reg product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
    const Reg swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(acc, _mm256_add_epi64(product, swapped));
  }
  KVMEM_TARGET static inline Reg Scramble(Reg acc, Reg secret) {
    const Reg prime = _mm256_set1_epi32(static_cast<int>(kXxh3Prime32));
    const Reg key = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), secret);
    const Reg high = _mm256_mul_epu32(_mm256_srli_epi64(key, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(key, prime), _mm256_slli_epi64(high, 32));
  }
};

}  // namespace

const CopyKernels kAvx2Kernels = {CpuPath::kAvx2, StreamCopy<Avx2>, CopyAdd<Avx2>, StoreFence};

}  // namespace kvmem::internal

#endif
