#include "support/version.h"

namespace kvmem {

int AbiVersion() { return kAbiVersion; }

}  // namespace kvmem
