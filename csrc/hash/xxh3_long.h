// XXH3-64 above 240 bytes, in parts: what the one-shot hash and the stream share. Only csrc/hash
// includes this; the constants a copy kernel needs are in xxh3_stream.h.
//
// Thread safety: pure.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hash/xxh3.h"

namespace kvmem::internal {

inline constexpr size_t kXxh3ShortBytes = 240;

// [0, n_blocks) whole blocks of 1,024 bytes from `in`, each scrambled at its end; then n_stripes
// stripes of the next block; then the input's last 64 bytes, which may overlap them, unless
// last_stripe is nullptr.
struct Xxh3Piece {
  const uint8_t* in;
  size_t n_blocks;
  size_t n_stripes;
  const uint8_t* last_stripe;
};

using Xxh3Consume = void (*)(uint64_t acc[8], const Xxh3Piece& piece);

// The best function of that path, or nullptr where this CPU lacks it.
Xxh3Consume SelectXxh3(Xxh3Path path);

void Xxh3Start(uint64_t acc[8]);
// The digest of `n_bytes` bytes, all consumed.
uint64_t Xxh3Finish(const uint64_t acc[8], uint64_t n_bytes);

}  // namespace kvmem::internal
