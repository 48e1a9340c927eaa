#include "hash/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace kvmem {
namespace {

alignas(16) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

void StoreBig32(uint8_t* out, uint32_t value) {
  if constexpr (std::endian::native == std::endian::little) value = __builtin_bswap32(value);
  std::memcpy(out, &value, sizeof(value));
}

uint32_t LoadBig32(const uint8_t* in) {
  uint32_t value;
  std::memcpy(&value, in, sizeof(value));
  return std::endian::native == std::endian::little ? __builtin_bswap32(value) : value;
}

// FIPS 180-4, section 6.2.2, with the schedule kept in a ring of 16 words.
void CompressPortable(uint32_t state[8], const uint8_t* blocks, size_t n_blocks) {
  for (; n_blocks != 0; --n_blocks, blocks += kSha256Block) {
    uint32_t w[16];
    for (int t = 0; t < 16; ++t) w[t] = LoadBig32(blocks + 4 * t);
    uint32_t v[8];
    std::copy(state, state + 8, v);
    for (int base = 0; base < 64; base += 16) {
#pragma GCC unroll 16
      for (int t = 0; t < 16; ++t) {
        if (base != 0) {
          const uint32_t a = w[(t + 1) & 15];
          const uint32_t b = w[(t + 14) & 15];
          const uint32_t s0 = std::rotr(a, 7) ^ std::rotr(a, 18) ^ (a >> 3);
          const uint32_t s1 = std::rotr(b, 17) ^ std::rotr(b, 19) ^ (b >> 10);
          w[t] += s0 + w[(t + 9) & 15] + s1;
        }
        // Variable i of the standard's a..h lives in v[(i - t) & 7]: nothing moves but the names.
        const auto at = [&v, t](int i) -> uint32_t& { return v[(i - t) & 7]; };
        const uint32_t e = at(4);
        const uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
        const uint32_t choice = at(6) ^ (e & (at(5) ^ at(6)));
        const uint32_t t1 = at(7) + sum1 + choice + kRound[base + t] + w[t];
        const uint32_t a = at(0);
        const uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
        const uint32_t majority = (a & at(1)) | (at(2) & (a | at(1)));
        at(3) += t1;
        at(7) = t1 + sum0 + majority;
      }
    }
    for (int i = 0; i < 8; ++i) state[i] += v[i];
  }
}

#if defined(__x86_64__)

#define KVMEM_SHA_NI __attribute__((target("sha,sse4.1")))

// The SHA extensions hold the state as (A,B,E,F) and (C,D,G,H), highest lane first.
struct ShaNiState {
  __m128i abef;
  __m128i cdgh;
};

KVMEM_SHA_NI inline __m128i SwapEachWord(__m128i bytes) {
  return _mm_shuffle_epi8(bytes, _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203));
}

KVMEM_SHA_NI inline ShaNiState LoadState(const uint32_t state[8]) {
  const __m128i dcba = _mm_loadu_si128(reinterpret_cast<const __m128i*>(state));
  const __m128i hgfe = _mm_loadu_si128(reinterpret_cast<const __m128i*>(state + 4));
  const __m128i cdab = _mm_shuffle_epi32(dcba, 0xB1);
  const __m128i efgh = _mm_shuffle_epi32(hgfe, 0x1B);
  return {_mm_alignr_epi8(cdab, efgh, 8), _mm_blend_epi16(efgh, cdab, 0xF0)};
}

// The words A to D and E to H, in the order of memory.
KVMEM_SHA_NI inline void InOrder(const ShaNiState& state, __m128i* dcba, __m128i* hgfe) {
  const __m128i feba = _mm_shuffle_epi32(state.abef, 0x1B);
  const __m128i dchg = _mm_shuffle_epi32(state.cdgh, 0xB1);
  *dcba = _mm_blend_epi16(feba, dchg, 0xF0);
  *hgfe = _mm_alignr_epi8(dchg, feba, 8);
}

// One block of 64 bytes, its words already big-endian. Two rounds an instruction; four rounds take
// one vector of four schedule words.
KVMEM_SHA_NI inline ShaNiState Rounds(const ShaNiState& before, __m128i w0, __m128i w1, __m128i w2,
                                      __m128i w3) {
  __m128i w[4] = {w0, w1, w2, w3};
  __m128i abef = before.abef;
  __m128i cdgh = before.cdgh;
#pragma GCC unroll 16
  for (int g = 0; g < 16; ++g) {
    __m128i& now = w[g & 3];
    if (g >= 4) {
      // W[t] = s1(W[t-2]) + W[t-7] + s0(W[t-15]) + W[t-16], four at a time.
      const __m128i& last = w[(g + 3) & 3];
      const __m128i t_minus_7 = _mm_alignr_epi8(last, w[(g + 2) & 3], 4);
      now = _mm_sha256msg2_epu32(
          _mm_add_epi32(_mm_sha256msg1_epu32(now, w[(g + 1) & 3]), t_minus_7), last);
    }
    const __m128i wk =
        _mm_add_epi32(now, _mm_load_si128(reinterpret_cast<const __m128i*>(kRound) + g));
    cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
    abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0E));
  }
  return {_mm_add_epi32(abef, before.abef), _mm_add_epi32(cdgh, before.cdgh)};
}

KVMEM_SHA_NI inline __m128i LoadBytes(const uint8_t* at) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}

KVMEM_SHA_NI inline ShaNiState CompressOne(const ShaNiState& state, const uint8_t* block) {
  return Rounds(state, SwapEachWord(LoadBytes(block)), SwapEachWord(LoadBytes(block + 16)),
                SwapEachWord(LoadBytes(block + 32)), SwapEachWord(LoadBytes(block + 48)));
}

KVMEM_SHA_NI void CompressShaNi(uint32_t state[8], const uint8_t* blocks, size_t n_blocks) {
  ShaNiState now = LoadState(state);
  for (; n_blocks != 0; --n_blocks, blocks += kSha256Block) now = CompressOne(now, blocks);
  __m128i dcba;
  __m128i hgfe;
  InOrder(now, &dcba, &hgfe);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state), dcba);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), hgfe);
}

// The parent goes in by registers: written into the message in two halves and read back in three
// that lie across them, it would wait for both stores to leave the store buffer, in the one place
// where the whole chain waits.
template <size_t kParentAt>
KVMEM_SHA_NI void ChainShaNi(uint8_t* message, size_t n_blocks, const uint8_t* parent,
                             uint8_t* key) {
  static_assert(kParentAt < 16, "the parent ends in the third quarter of the first block");
  constexpr int kShift = 16 - static_cast<int>(kParentAt);
  const __m128i low = LoadBytes(parent);
  const __m128i high = LoadBytes(parent + 16);
  // [0, kParentAt)  as it lies;  [kParentAt, kParentAt + 32)  the parent;  the rest as it lies
  const __m128i before = LoadBytes(message + kParentAt - 16);
  const __m128i after = LoadBytes(message + kParentAt + kSha256Bytes);
  ShaNiState state = Rounds(
      LoadState(kSha256Init), SwapEachWord(_mm_alignr_epi8(low, before, kShift)),
      SwapEachWord(_mm_alignr_epi8(high, low, kShift)),
      SwapEachWord(_mm_alignr_epi8(after, high, kShift)), SwapEachWord(LoadBytes(message + 48)));
  while (--n_blocks != 0) {
    message += kSha256Block;
    state = CompressOne(state, message);
  }
  __m128i dcba;
  __m128i hgfe;
  InOrder(state, &dcba, &hgfe);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(key), SwapEachWord(dcba));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(key + 16), SwapEachWord(hgfe));
}

bool HasShaNi() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  constexpr unsigned kShaBit = 1u << 29;  // CPUID leaf 7, EBX
  return __builtin_cpu_supports("sse4.1") && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
         (ebx & kShaBit) != 0;
}

#endif

template <size_t kParentAt>
void ChainPortable(uint8_t* message, size_t n_blocks, const uint8_t* parent, uint8_t* key) {
  std::memcpy(message + kParentAt, parent, kSha256Bytes);
  uint32_t state[8];
  std::copy(kSha256Init, kSha256Init + 8, state);
  CompressPortable(state, message, n_blocks);
  Sha256Store(state, key);
}

}  // namespace

std::optional<Sha256Path> ParseSha256Path(std::string_view name) {
  if (name == "auto") return Sha256Path::kAuto;
  if (name == "sha_ni") return Sha256Path::kShaNi;
  if (name == "plain") return Sha256Path::kPortable;
  return std::nullopt;
}

Sha256Compress SelectSha256(Sha256Path path) {
#if defined(__x86_64__)
  static const bool has_sha_ni = HasShaNi();
  if (path != Sha256Path::kPortable && has_sha_ni) return CompressShaNi;
#endif
  return path == Sha256Path::kShaNi ? nullptr : CompressPortable;
}

template <size_t kParentAt>
Sha256Chain SelectSha256Chain(Sha256Path path) {
#if defined(__x86_64__)
  if (SelectSha256(path) == CompressShaNi) return ChainShaNi<kParentAt>;
#endif
  static_cast<void>(path);
  return ChainPortable<kParentAt>;
}

template Sha256Chain SelectSha256Chain<3>(Sha256Path path);
template Sha256Chain SelectSha256Chain<13>(Sha256Path path);

size_t Sha256Pad(uint8_t* message, size_t n_bytes) {
  const size_t n_blocks = (n_bytes + 8) / kSha256Block + 1;
  uint8_t* const end = message + n_blocks * kSha256Block;
  // [n_bytes, end - 8)  one 1 bit, then zeros;  [end - 8, end)  the length in bits;  then any bytes
  message[n_bytes] = 0x80;
  std::memset(message + n_bytes + 1, 0, 71);  // of a fixed length: no call
  StoreBig32(end - 8, static_cast<uint32_t>(static_cast<uint64_t>(n_bytes) >> 29));
  StoreBig32(end - 4, static_cast<uint32_t>(n_bytes << 3));
  return n_blocks;
}

void Sha256Store(const uint32_t state[8], uint8_t digest[kSha256Bytes]) {
  for (int i = 0; i < 8; ++i) StoreBig32(digest + 4 * i, state[i]);
}

}  // namespace kvmem
