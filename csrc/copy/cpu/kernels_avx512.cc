#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)

// GCC 12's own AVX-512 intrinsics start from a register that is deliberately undefined, and it
// warns of them once they are inlined (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define KVMEM_TARGET __attribute__((target("avx512f")))
#include "copy/cpu/streams.h"

namespace kvmem::internal {
namespace {

struct Avx512 {
  using Reg = __m512i;
  static constexpr size_t kBytes = 64;

  KVMEM_TARGET static inline Reg Load(const std::byte* from) { return _mm512_loadu_si512(from); }
  KVMEM_TARGET static inline void Store(std::byte* to, Reg value) {
    _mm512_storeu_si512(to, value);
  }
  KVMEM_TARGET static inline void Stream(std::byte* to, Reg value) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value);
  }
  KVMEM_TARGET static inline Reg Add(Reg acc, Reg value, Reg secret) {
    const Reg key = _mm512_xor_si512(value, secret);
    const Reg product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    const Reg swapped = _mm512_shuffle_epi32(value, _MM_PERM_BADC);
    return _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
  }
  KVMEM_TARGET static inline Reg Scramble(Reg acc, Reg secret) {
    const Reg prime = _mm512_set1_epi32(static_cast<int>(kXxh3Prime32));
    const Reg key = _mm512_xor_si512(_mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47)), secret);
    const Reg high = _mm512_mul_epu32(_mm512_srli_epi64(key, 32), prime);
    return _mm512_add_epi64(_mm512_mul_epu32(key, prime), _mm512_slli_epi64(high, 32));
  }
};

}  // namespace

const CopyKernels kAvx512Kernels = {CpuPath::kAvx512, StreamCopy<Avx512>, CopyAdd<Avx512>,
                                    StoreFence};

}  // namespace kvmem::internal

#endif
