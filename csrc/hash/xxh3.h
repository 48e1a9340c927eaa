// XXH3-64 with seed 0 and the default secret: checksums and tables, never identity.
//
// The algorithm is the published one (xxHash fast digest algorithm, version 0.2.0, section XXH3;
// draft-josefsson-xxhash-00), so any XXH3 library computes the same value.
//
// Thread safety: pure. Inputs above 240 bytes take the path that the CPU offers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace kvmem {

enum class Xxh3Path { kAuto, kAvx512, kAvx2, kScalar };

// "auto", "avx512", "avx2" or "plain"; nullopt for any other word.
std::optional<Xxh3Path> ParseXxh3Path(std::string_view name);

// Whether this CPU (and build) has that path; kAuto and kScalar always.
bool HasXxh3Path(Xxh3Path path);

// The 64-bit digest of `data`. REQUIRES: HasXxh3Path(path).
uint64_t Xxh3_64(const void* data, size_t n_bytes, Xxh3Path path = Xxh3Path::kAuto);

}  // namespace kvmem
