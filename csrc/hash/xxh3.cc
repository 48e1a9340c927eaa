#include "hash/xxh3.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "hash/xxh3_long.h"
#include "hash/xxh3_stream.h"

#if defined(__x86_64__)
// GCC 12 takes its own _mm512_undefined_epi32 for a read of an uninitialised value (GCC PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

static_assert(std::endian::native == std::endian::little, "words are read as they lie");

namespace kvmem {

alignas(64) const unsigned char kXxh3Secret[kXxh3SecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

namespace {

using internal::Xxh3Piece;

constexpr uint64_t kPrime32_1 = kXxh3Prime32;
constexpr uint64_t kPrime32_2 = 0x85EBCA77;
constexpr uint64_t kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87;
constexpr uint64_t kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9;
constexpr uint64_t kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kPrimeMx1 = 0x165667919E3779F9;
constexpr uint64_t kPrimeMx2 = 0x9FB21C651E98DF25;

constexpr size_t kSecretStep = 8;  // how far the secret moves on for each stripe
constexpr size_t kStripesPerBlock = kXxh3Block / kXxh3Stripe;
static_assert(kStripesPerBlock * kSecretStep == kXxh3ScrambleOffset);
constexpr size_t kLastStripeAt = kXxh3SecretBytes - 71;
constexpr size_t kMergeAt = 11;
constexpr size_t kAhead = 1024;  // prefetch distance

template <typename Word>
Word Load(const uint8_t* at) {
  Word word;
  std::memcpy(&word, at, sizeof(word));
  return word;
}

uint64_t Secret64(size_t at) { return Load<uint64_t>(kXxh3Secret + at); }

// The low half of a 128-bit product, xor its high half.
uint64_t FoldedProduct(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t Avalanche(uint64_t x) {
  x = (x ^ (x >> 37)) * kPrimeMx1;
  return x ^ (x >> 32);
}

uint64_t AvalancheXxh64(uint64_t x) {
  x = (x ^ (x >> 33)) * kPrime64_2;
  x = (x ^ (x >> 29)) * kPrime64_3;
  return x ^ (x >> 32);
}

uint64_t Hash0To16(const uint8_t* in, size_t n) {
  if (n > 8) {
    const uint64_t low = Secret64(24) ^ Secret64(32) ^ Load<uint64_t>(in);
    const uint64_t high = Secret64(40) ^ Secret64(48) ^ Load<uint64_t>(in + n - 8);
    return Avalanche(n + __builtin_bswap64(low) + high + FoldedProduct(low, high));
  }
  if (n >= 4) {
    const uint64_t first = Load<uint32_t>(in);
    const uint64_t last = Load<uint32_t>(in + n - 4);
    uint64_t x = Secret64(8) ^ Secret64(16) ^ (last | (first << 32));
    x ^= std::rotl(x, 49) ^ std::rotl(x, 24);
    x *= kPrimeMx2;
    x ^= (x >> 35) + n;
    x *= kPrimeMx2;
    return x ^ (x >> 28);
  }
  if (n > 0) {
    const uint32_t combined = static_cast<uint32_t>(in[n - 1]) | (static_cast<uint32_t>(n) << 8) |
                              (static_cast<uint32_t>(in[0]) << 16) |
                              (static_cast<uint32_t>(in[n >> 1]) << 24);
    const uint32_t secret = Load<uint32_t>(kXxh3Secret) ^ Load<uint32_t>(kXxh3Secret + 4);
    return AvalancheXxh64(static_cast<uint64_t>(secret ^ combined));
  }
  return AvalancheXxh64(Secret64(56) ^ Secret64(64));
}

uint64_t Mix16(const uint8_t* in, size_t secret_at) {
  return FoldedProduct(Load<uint64_t>(in) ^ Secret64(secret_at),
                       Load<uint64_t>(in + 8) ^ Secret64(secret_at + 8));
}

uint64_t Hash17To128(const uint8_t* in, size_t n) {
  uint64_t acc = n * kPrime64_1;
  for (size_t i = (n - 1) / 32 + 1; i-- > 0;) {  // from both ends towards the middle
    acc += Mix16(in + 16 * i, 32 * i);
    acc += Mix16(in + n - 16 * i - 16, 32 * i + 16);
  }
  return Avalanche(acc);
}

uint64_t Hash129To240(const uint8_t* in, size_t n) {
  uint64_t acc = n * kPrime64_1;
  for (size_t i = 0; i < 8; ++i) acc += Mix16(in + 16 * i, 16 * i);
  acc = Avalanche(acc);
  for (size_t i = 8; i < n / 16; ++i) acc += Mix16(in + 16 * i, 16 * (i - 8) + 3);
  acc += Mix16(in + n - 16, 119);
  return Avalanche(acc);
}

void AccumulateScalar(uint64_t acc[8], const uint8_t* in, const uint8_t* secret) {
  for (size_t lane = 0; lane < 8; ++lane) {
    const uint64_t word = Load<uint64_t>(in + 8 * lane);
    const uint64_t keyed = word ^ Load<uint64_t>(secret + 8 * lane);
    acc[lane ^ 1] += word;
    acc[lane] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
  }
}

void LongScalar(uint64_t acc[8], const Xxh3Piece& piece) {
  const uint8_t* in = piece.in;
  for (size_t block = 0; block < piece.n_blocks; ++block, in += kXxh3Block) {
    for (size_t s = 0; s < kStripesPerBlock; ++s) {
      AccumulateScalar(acc, in + kXxh3Stripe * s, kXxh3Secret + kSecretStep * s);
    }
    for (size_t lane = 0; lane < 8; ++lane) {
      acc[lane] =
          (acc[lane] ^ (acc[lane] >> 47) ^ Secret64(kXxh3ScrambleOffset + 8 * lane)) * kPrime32_1;
    }
  }
  for (size_t s = 0; s < piece.n_stripes; ++s) {
    AccumulateScalar(acc, in + kXxh3Stripe * s, kXxh3Secret + kSecretStep * s);
  }
  if (piece.last_stripe != nullptr) {
    AccumulateScalar(acc, piece.last_stripe, kXxh3Secret + kLastStripeAt);
  }
}

#if defined(__x86_64__)

__attribute__((target("avx2"),
               always_inline)) inline __m256i AccumulateAvx2(__m256i acc, const uint8_t* in,
                                                             const uint8_t* secret) {
  const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
  const __m256i keyed =
      _mm256_xor_si256(word, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
  const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(word, 0x4E);  // lane i gets lane i ^ 1
  return _mm256_add_epi64(acc, _mm256_add_epi64(product, swapped));
}

__attribute__((target("avx2"), always_inline)) inline __m256i ScrambleAvx2(__m256i acc,
                                                                           const uint8_t* secret) {
  const __m256i mixed =
      _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)),
                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
  const __m256i prime = _mm256_set1_epi64x(static_cast<long long>(kPrime32_1));
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
  return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) void LongAvx2(uint64_t acc[8], const Xxh3Piece& piece) {
  __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc));
  __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + 4));
  const uint8_t* in = piece.in;
  for (size_t block = 0; block <= piece.n_blocks; ++block, in += kXxh3Block) {
    const bool whole = block < piece.n_blocks;
    const size_t n_stripes = whole ? kStripesPerBlock : piece.n_stripes;
    for (size_t s = 0; s < n_stripes; ++s) {
      const uint8_t* const stripe = in + kXxh3Stripe * s;
      const uint8_t* const secret = kXxh3Secret + kSecretStep * s;
      _mm_prefetch(reinterpret_cast<const char*>(stripe + kAhead), _MM_HINT_T0);
      a = AccumulateAvx2(a, stripe, secret);
      b = AccumulateAvx2(b, stripe + 32, secret + 32);
    }
    if (whole) {
      a = ScrambleAvx2(a, kXxh3Secret + kXxh3ScrambleOffset);
      b = ScrambleAvx2(b, kXxh3Secret + kXxh3ScrambleOffset + 32);
    }
  }
  if (piece.last_stripe != nullptr) {
    a = AccumulateAvx2(a, piece.last_stripe, kXxh3Secret + kLastStripeAt);
    b = AccumulateAvx2(b, piece.last_stripe + 32, kXxh3Secret + kLastStripeAt + 32);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 4), b);
}

__attribute__((target("avx512f"), always_inline)) inline __m512i AccumulateAvx512(
    __m512i acc, const uint8_t* in, const uint8_t* secret) {
  const __m512i word = _mm512_loadu_si512(in);
  const __m512i keyed = _mm512_xor_si512(word, _mm512_loadu_si512(secret));
  const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
  const __m512i swapped = _mm512_shuffle_epi32(word, static_cast<_MM_PERM_ENUM>(0x4E));
  return _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
}

__attribute__((target("avx512f"))) void LongAvx512(uint64_t acc[8], const Xxh3Piece& piece) {
  __m512i a = _mm512_loadu_si512(acc);
  const __m512i prime = _mm512_set1_epi64(static_cast<long long>(kPrime32_1));
  const uint8_t* in = piece.in;
  for (size_t block = 0; block <= piece.n_blocks; ++block, in += kXxh3Block) {
    const bool whole = block < piece.n_blocks;
    const size_t n_stripes = whole ? kStripesPerBlock : piece.n_stripes;
    for (size_t s = 0; s < n_stripes; ++s) {
      const uint8_t* const stripe = in + kXxh3Stripe * s;
      _mm_prefetch(reinterpret_cast<const char*>(stripe + kAhead), _MM_HINT_T0);
      a = AccumulateAvx512(a, stripe, kXxh3Secret + kSecretStep * s);
    }
    if (whole) {
      const __m512i mixed = _mm512_xor_si512(_mm512_xor_si512(a, _mm512_srli_epi64(a, 47)),
                                             _mm512_loadu_si512(kXxh3Secret + kXxh3ScrambleOffset));
      const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
      a = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
    }
  }
  if (piece.last_stripe != nullptr) {
    a = AccumulateAvx512(a, piece.last_stripe, kXxh3Secret + kLastStripeAt);
  }
  _mm512_storeu_si512(acc, a);
}

#endif

}  // namespace

namespace internal {

Xxh3Consume SelectXxh3(Xxh3Path path) {
#if defined(__x86_64__)
  static const bool has_avx512 = __builtin_cpu_supports("avx512f");
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  const bool any = path == Xxh3Path::kAuto;
  if (has_avx512 && (any || path == Xxh3Path::kAvx512)) return LongAvx512;
  if (has_avx2 && (any || path == Xxh3Path::kAvx2)) return LongAvx2;
#endif
  return path == Xxh3Path::kAuto || path == Xxh3Path::kScalar ? LongScalar : nullptr;
}

void Xxh3Start(uint64_t acc[8]) {
  constexpr uint64_t kStart[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                  kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  std::copy(kStart, kStart + 8, acc);
}

uint64_t Xxh3Finish(const uint64_t acc[8], uint64_t n_bytes) {
  uint64_t result = n_bytes * kPrime64_1;
  for (size_t i = 0; i < 4; ++i) {
    result += FoldedProduct(acc[2 * i] ^ Secret64(kMergeAt + 16 * i),
                            acc[2 * i + 1] ^ Secret64(kMergeAt + 16 * i + 8));
  }
  return Avalanche(result);
}

}  // namespace internal

std::optional<Xxh3Path> ParseXxh3Path(std::string_view name) {
  if (name == "auto") return Xxh3Path::kAuto;
  if (name == "avx512") return Xxh3Path::kAvx512;
  if (name == "avx2") return Xxh3Path::kAvx2;
  if (name == "plain") return Xxh3Path::kScalar;
  return std::nullopt;
}

bool HasXxh3Path(Xxh3Path path) { return internal::SelectXxh3(path) != nullptr; }

uint64_t Xxh3_64(const void* data, size_t n_bytes, Xxh3Path path) {
  const auto* in = static_cast<const uint8_t*>(data);
  if (n_bytes <= 16) return Hash0To16(in, n_bytes);
  if (n_bytes <= 128) return Hash17To128(in, n_bytes);
  if (n_bytes <= internal::kXxh3ShortBytes) return Hash129To240(in, n_bytes);
  alignas(64) uint64_t acc[8];
  internal::Xxh3Start(acc);
  const size_t n_blocks = (n_bytes - 1) / kXxh3Block;  // the last is kept back even when whole
  const size_t n_stripes = (n_bytes - 1 - n_blocks * kXxh3Block) / kXxh3Stripe;
  internal::SelectXxh3(path)(acc, {in, n_blocks, n_stripes, in + n_bytes - kXxh3Stripe});
  return internal::Xxh3Finish(acc, n_bytes);
}

}  // namespace kvmem
