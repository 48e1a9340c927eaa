// XXH3-64 (seed 0) of bytes that arrive in steps, for a length known at the start.
//
// Thread safety: one thread at a time.
//
// XXH3 hashes an input of more than 240 bytes in blocks of 1,024: sixteen 64-byte stripes are
// added to eight accumulators, then the accumulators are scrambled. The last block, full or not,
// is not scrambled and the last 64 bytes of the input are added once more. The parts are public
// so that a copy kernel can do the adding while it moves the bytes
// (XXH3 specification, Cyan4973/xxHash doc/xxhash_spec.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvmem {

inline constexpr size_t kXxh3Stripe = 64;
inline constexpr size_t kXxh3Block = 1024;
inline constexpr size_t kXxh3SecretBytes = 192;
inline constexpr size_t kXxh3ScrambleOffset = kXxh3SecretBytes - kXxh3Stripe;
inline constexpr uint32_t kXxh3Prime32 = 0x9E3779B1U;
extern const unsigned char kXxh3Secret[kXxh3SecretBytes];

// For hashes whose adding is done elsewhere, of more than 240 bytes: the accumulators before the
// first stripe, and the digest of n_bytes once the last is added.
void Xxh3Begin(uint64_t acc[8]);
uint64_t Xxh3DigestOf(const uint64_t acc[8], uint64_t n_bytes);

class Xxh3Stream {
 public:
  explicit Xxh3Stream(uint64_t total_bytes);

  // REQUIRES: the bytes of all calls together are at most total_bytes.
  void Update(const void* data, size_t bytes);

  // For a kernel that adds whole blocks itself, straight into accumulators().
  // REQUIRES: a multiple of 1,024 bytes has gone before; exactly 1,024 bytes remain afterwards.
  uint64_t* accumulators() { return acc_; }
  void SkipBlocks(size_t blocks);

  // REQUIRES: exactly total_bytes have gone in.
  uint64_t Digest() const;

 private:
  void AddBlocks(const unsigned char* blocks, size_t n);

  alignas(64) uint64_t acc_[8];
  uint64_t total_;
  uint64_t seen_ = 0;
  size_t pending_bytes_ = 0;
  unsigned char last_[kXxh3Stripe] = {};  // the 64 bytes before pending_
  unsigned char pending_[kXxh3Block];
};

}  // namespace kvmem
