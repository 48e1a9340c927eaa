// SHA-256 (FIPS 180-4) in parts, for callers that write their message where it is padded and
// hashed.
//
// Thread safety: every function here is pure. The path is chosen from the CPU at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace kvmem {

inline constexpr size_t kSha256Bytes = 32;
inline constexpr size_t kSha256Block = 64;

inline constexpr uint32_t kSha256Init[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

// Folds `n_blocks` blocks of 64 bytes into `state`.
using Sha256Compress = void (*)(uint32_t state[8], const uint8_t* blocks, size_t n_blocks);

// Hashes a padded message of `n_blocks` blocks, at least 1, in which 32 bytes, the parent's, are
// not there yet. Writes 32 bytes of key, and whatever it likes into the message's 32 bytes.
// REQUIRES: 16 readable bytes before the message.
using Sha256Chain = void (*)(uint8_t* message, size_t n_blocks, const uint8_t* parent,
                             uint8_t* key);

enum class Sha256Path { kAuto, kShaNi, kPortable };

// "auto", "sha_ni" or "plain"; nullopt for any other word.
std::optional<Sha256Path> ParseSha256Path(std::string_view name);

// The compression of that path, or nullptr where this CPU lacks it. kAuto always has one.
Sha256Compress SelectSha256(Sha256Path path);

// For messages with the parent at kParentAt: 13 in a pickle, 3 in CBOR. REQUIRES:
// SelectSha256(path) is not nullptr.
template <size_t kParentAt>
Sha256Chain SelectSha256Chain(Sha256Path path);

// Writes the padding of a message of `n_bytes` at `message + n_bytes`; returns the number of whole
// blocks the message now has. Writes at most 72 bytes.
size_t Sha256Pad(uint8_t* message, size_t n_bytes);

// Big-endian bytes of a finished state.
void Sha256Store(const uint32_t state[8], uint8_t digest[kSha256Bytes]);

}  // namespace kvmem
