// Which copy kernels this machine can run.
//
// Thread safety: every function may be called from any thread.
#pragma once

#include <optional>
#include <string_view>

namespace kvmem {

// In rising order: a machine that has one has those before it.
enum class CpuPath : int { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The best path of this machine, found once (CPUID, and that the kernel saves the registers).
CpuPath DetectCpu();

// "plain", "avx2" or "avx512"; nullopt for any other word.
std::optional<CpuPath> ParseCpuPath(std::string_view name);

const char* CpuPathName(CpuPath path);

}  // namespace kvmem
