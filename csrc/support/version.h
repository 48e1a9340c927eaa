// The version of what the two halves of a connector share in memory.
#pragma once

namespace kvmem {

// Raised whenever the arena's layout or a structure in it changes.
inline constexpr int kAbiVersion = 1;

int AbiVersion();

}  // namespace kvmem
