#include "bind/bind.h"

NB_MODULE(_core, m) {
  m.doc() = "kvmem's native core: hashes, the prefix index with its pool, block copy and disk.";
  kvmem::bind::RegisterHash(m);
  kvmem::bind::RegisterCursor(m);
  kvmem::bind::RegisterIndex(m);
  kvmem::bind::RegisterCopy(m);
  kvmem::bind::RegisterDisk(m);
  kvmem::bind::RegisterShares(m);
}
