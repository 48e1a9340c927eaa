// The only room that knows Python. Each room of the core has one file here that registers its
// classes; module.cc calls them in order.
#pragma once

#include <nanobind/nanobind.h>

namespace kvmem::bind {

void RegisterHash(nanobind::module_& m);
void RegisterCursor(nanobind::module_& m);
void RegisterIndex(nanobind::module_& m);
void RegisterCopy(nanobind::module_& m);
void RegisterDisk(nanobind::module_& m);
void RegisterShares(nanobind::module_& m);

}  // namespace kvmem::bind
