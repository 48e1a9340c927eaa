// Token ids as pickle and canonical CBOR write them, one after the other.
//
// Thread safety: pure. AVX-512 with VBMI2 writes twelve at a time, SSSE3 four, other CPUs one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvmem::internal {

inline constexpr size_t kMaxTokenBytes = 5;
// A writer stores whole registers: it may write so many bytes past what it returns.
inline constexpr size_t kWriterSlack = 64;

// Writes `n` tokens at `at`; returns the end. REQUIRES: no token is negative, and
// n * kMaxTokenBytes + kWriterSlack bytes of room.
using TokenWriter = uint8_t* (*)(uint8_t* at, const int32_t* tokens, size_t n);

// BININT1, BININT2 or BININT: the first that holds the value (Lib/pickletools.py).
TokenWriter SelectPickleWriter(bool portable);
// Major type 0 in its shortest form (RFC 8949, section 4.2.1).
TokenWriter SelectCborWriter(bool portable);

}  // namespace kvmem::internal
