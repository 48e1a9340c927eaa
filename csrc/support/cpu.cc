#include "support/cpu.h"

namespace kvmem {

CpuPath DetectCpu() {
#if defined(__x86_64__)
  static const CpuPath path = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return CpuPath::kAvx512;
    if (__builtin_cpu_supports("avx2")) return CpuPath::kAvx2;
    return CpuPath::kPlain;
  }();
  return path;
#else
  return CpuPath::kPlain;
#endif
}

std::optional<CpuPath> ParseCpuPath(std::string_view name) {
  for (CpuPath path : {CpuPath::kPlain, CpuPath::kAvx2, CpuPath::kAvx512}) {
    if (name == CpuPathName(path)) return path;
  }
  return std::nullopt;
}

const char* CpuPathName(CpuPath path) {
  switch (path) {
    case CpuPath::kAvx512:
      return "avx512";
    case CpuPath::kAvx2:
      return "avx2";
    case CpuPath::kPlain:
      break;
  }
  return "plain";
}

}  // namespace kvmem
