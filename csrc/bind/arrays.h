// Arrays for Python out of the core's vectors.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <utility>
#include <vector>

namespace kvmem::bind {

// A numpy array that owns what was the vector's.
template <typename T>
nanobind::object ToNumpy(std::vector<T>&& values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* const data = owned->data();
  const size_t n = owned->size();
  const nanobind::capsule owner(owned.get(),
                                [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  static_cast<void>(owned.release());
  return nanobind::cast(nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<1>>(data, {n}, owner));
}

}  // namespace kvmem::bind
