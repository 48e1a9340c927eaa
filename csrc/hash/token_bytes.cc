#include "hash/token_bytes.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
// GCC 12 takes its own _mm512_undefined_epi32 for a read of an uninitialised value (GCC PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

static_assert(std::endian::native == std::endian::little, "pickle's integers are little-endian");

namespace kvmem::internal {
namespace {

void Store64(uint8_t* at, uint64_t value) { std::memcpy(at, &value, sizeof(value)); }

// Without branches, since the widths of a real prompt's ids are as good as random.
uint8_t* PickleOne(uint8_t* at, uint32_t token) {
  const uint32_t above_1 = token > 0xFF;
  const uint32_t above_2 = token > 0xFFFF;
  const uint32_t opcode = 'K' + above_1 * ('M' - 'K') - above_2 * ('M' - 'J');
  Store64(at, opcode | static_cast<uint64_t>(token) << 8);
  return at + 2 + above_1 + 2 * above_2;
}

// The value itself below 24, or 1, 2, 4 big-endian bytes after the head.
uint8_t* CborOne(uint8_t* at, uint32_t value) {
  const uint32_t above = (value > 23) + (value > 0xFF) + (value > 0xFFFF);
  const uint32_t n_bytes = above + (above == 3);
  const uint32_t head = above == 0 ? value : 0x17 + above;
  const uint64_t tail = static_cast<uint64_t>(__builtin_bswap32(value)) >> (32 - 8 * n_bytes);
  Store64(at, head | tail << 8);
  return at + 1 + n_bytes;
}

template <uint8_t* (*One)(uint8_t*, uint32_t)>
uint8_t* WriteEach(uint8_t* at, const int32_t* tokens, size_t n) {
  for (size_t i = 0; i < n; ++i) at = One(at, static_cast<uint32_t>(tokens[i]));
  return at;
}

#if defined(__x86_64__)

#define KVMEM_SSSE3 __attribute__((target("ssse3")))

// Four tokens by their widths: where each byte of the result comes from, and what is put on it.
struct Four {
  alignas(64) uint8_t from[32];  // a byte of the four ids; 0x80 for none
  uint8_t heads[32];
};

struct FourTable {
  Four by_widths[256];
  uint8_t n_bytes[256];
};

// A width is a number from 0 up, its lower bit in bit i and its higher bit in bit 4 + i of the
// index for token i.
template <bool kPickle>
constexpr FourTable kFourTable = [] {
  FourTable table = {};
  for (unsigned index = 0; index < 256; ++index) {
    Four& four = table.by_widths[index];
    for (uint8_t& byte : four.from) byte = 0x80;
    unsigned at = 0;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned width = (index >> i & 1) | (index >> (4 + i) & 1) << 1;
      const unsigned bytes_of[] = {kPickle ? 1u : 0u, kPickle ? 2u : 1u, kPickle ? 4u : 2u, 4u};
      const uint8_t pickle_heads[] = {'K', 'M', 'J', 'J'};
      const uint8_t cbor_heads[] = {0, 0x18, 0x19, 0x1A};
      const unsigned n = bytes_of[width];
      four.heads[at] = kPickle ? pickle_heads[width] : cbor_heads[width];
      if (n == 0) four.from[at] = static_cast<uint8_t>(4 * i);  // a head below 24 is the value
      ++at;
      for (unsigned b = 0; b < n; ++b) {
        four.from[at++] = static_cast<uint8_t>(4 * i + (kPickle ? b : n - 1 - b));
      }
    }
    table.n_bytes[index] = static_cast<uint8_t>(at);
  }
  return table;
}();

KVMEM_SSSE3 inline unsigned Above(__m128i ids, int value) {
  return static_cast<unsigned>(
      _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(ids, _mm_set1_epi32(value)))));
}

template <bool kPickle>
KVMEM_SSSE3 uint8_t* WriteSsse3(uint8_t* at, const int32_t* tokens, size_t n) {
  constexpr const FourTable& kTable = kFourTable<kPickle>;
  for (; n >= 4; n -= 4, tokens += 4) {
    const __m128i ids = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tokens));
    const unsigned above_1 = Above(ids, 0xFF);
    const unsigned above_2 = Above(ids, 0xFFFF);
    unsigned widths;
    if constexpr (kPickle) {
      widths = (above_1 ^ above_2) | above_2 << 4;
    } else {
      widths = (Above(ids, 23) ^ above_1 ^ above_2) | above_1 << 4;
    }
    const auto* four = reinterpret_cast<const __m128i*>(&kTable.by_widths[widths]);
    auto* const out = reinterpret_cast<__m128i*>(at);
    _mm_storeu_si128(out, _mm_or_si128(_mm_shuffle_epi8(ids, four[0]), four[2]));
    _mm_storeu_si128(out + 1, _mm_or_si128(_mm_shuffle_epi8(ids, four[1]), four[3]));
    at += kTable.n_bytes[widths];
  }
  return WriteEach<kPickle ? PickleOne : CborOne>(at, tokens, n);
}

#define KVMEM_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512vbmi2,bmi2,popcnt")))

// Every token gets five bytes of a register: its head, then its four bytes in the format's order;
// those that its width leaves out are then squeezed out.
constexpr size_t kAtOnce = 12;
constexpr uint64_t kHeads = 0x0084210842108421;  // bit 5 * i for token i

struct Order {
  alignas(64) uint8_t bytes[64];
};

template <bool kPickle>
constexpr Order kOrder = [] {
  Order order = {};
  for (size_t i = 0; i < kAtOnce; ++i) {
    order.bytes[5 * i] = static_cast<uint8_t>(4 * i);  // a CBOR head below 24 is the value
    for (size_t b = 0; b < 4; ++b) {
      order.bytes[5 * i + 1 + b] = static_cast<uint8_t>(4 * i + (kPickle ? b : 3 - b));
    }
  }
  return order;
}();

template <bool kPickle>
KVMEM_VBMI2 uint8_t* WriteVbmi2(uint8_t* at, const int32_t* tokens, size_t n) {
  const __m512i spread = _mm512_load_si512(kOrder<kPickle>.bytes);
  while (n != 0) {
    const size_t now = std::min(n, kAtOnce);
    const uint64_t heads = _bzhi_u64(kHeads, static_cast<uint32_t>(5 * now));
    const auto lanes = static_cast<__mmask16>((1u << now) - 1);
    const __m512i ids = _mm512_maskz_loadu_epi32(lanes, tokens);
    const uint64_t above_1 =
        _pdep_u64(_mm512_cmpgt_epu32_mask(ids, _mm512_set1_epi32(0xFF)), heads);
    const uint64_t above_2 =
        _pdep_u64(_mm512_cmpgt_epu32_mask(ids, _mm512_set1_epi32(0xFFFF)), heads);
    __m512i bytes = _mm512_permutexvar_epi8(spread, ids);
    uint64_t kept;
    if constexpr (kPickle) {
      bytes = _mm512_mask_mov_epi8(bytes, heads, _mm512_set1_epi8('K'));
      bytes = _mm512_mask_mov_epi8(bytes, above_1, _mm512_set1_epi8('M'));
      bytes = _mm512_mask_mov_epi8(bytes, above_2, _mm512_set1_epi8('J'));
      kept = heads | heads << 1 | above_1 << 2 | above_2 << 3 | above_2 << 4;
    } else {
      const uint64_t above_23 =
          _pdep_u64(_mm512_cmpgt_epu32_mask(ids, _mm512_set1_epi32(23)), heads);
      bytes = _mm512_mask_mov_epi8(bytes, above_23, _mm512_set1_epi8(0x18));
      bytes = _mm512_mask_mov_epi8(bytes, above_1, _mm512_set1_epi8(0x19));
      bytes = _mm512_mask_mov_epi8(bytes, above_2, _mm512_set1_epi8(0x1A));
      kept = heads | above_2 << 1 | above_2 << 2 | above_1 << 3 | above_23 << 4;
    }
    _mm512_storeu_si512(at, _mm512_maskz_compress_epi8(kept, bytes));
    at += _mm_popcnt_u64(kept);
    tokens += now;
    n -= now;
  }
  return at;
}

bool HasVbmi2() {
  static const bool has = __builtin_cpu_supports("avx512vbmi2") &&
                          __builtin_cpu_supports("avx512vbmi") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("bmi2");
  return has;
}

#endif

}  // namespace

TokenWriter SelectPickleWriter(bool portable) {
#if defined(__x86_64__)
  if (!portable && HasVbmi2()) return WriteVbmi2<true>;
  if (!portable && __builtin_cpu_supports("ssse3")) return WriteSsse3<true>;
#endif
  static_cast<void>(portable);
  return WriteEach<PickleOne>;
}

TokenWriter SelectCborWriter(bool portable) {
#if defined(__x86_64__)
  if (!portable && HasVbmi2()) return WriteVbmi2<false>;
  if (!portable && __builtin_cpu_supports("ssse3")) return WriteSsse3<false>;
#endif
  static_cast<void>(portable);
  return WriteEach<CborOne>;
}

}  // namespace kvmem::internal
