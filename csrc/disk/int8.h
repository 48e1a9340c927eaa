// Approximate blocks: 8 bits an element and a scale for each 64 (disk_codec.h has the bytes).
//
// Why one scale for 64 neighbours: it needs nothing of an engine's layout, and where a head has 64
// or 128 elements a token it is a scale for a token's head, or half of it.
//
// Thread safety: pure. The results are the same on every machine: no step is left to a compiler's
// or a processor's choice of rounding.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvmem {

inline constexpr size_t kInt8Group = 64;  // elements of one scale

// As DiskCodec::Encode and Decode. REQUIRES: IsApproximate(codec).
size_t EncodeInt8(uint32_t codec, const std::byte* from, size_t n, std::byte* to, size_t room);
bool DecodeInt8(uint32_t codec, const std::byte* from, size_t n_stored, std::byte* to, size_t n);

}  // namespace kvmem
