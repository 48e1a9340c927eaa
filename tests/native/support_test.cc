// The version that both halves of a connector compare is the header's.
#include "check.h"
#include "support/version.h"

int main() {
  CHECK(kvmem::AbiVersion() == kvmem::kAbiVersion);
  return 0;
}
