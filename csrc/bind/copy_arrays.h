// What the copiers' bindings take and give: numpy arrays of ids, checked before the GIL goes.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "copy/copy_request.h"

namespace kvmem::bind {

template <class T>
using Vector =
    nanobind::ndarray<const T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <class T>
using NewVector = nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<1>, nanobind::c_contig>;
using Buffer =
    nanobind::ndarray<uint8_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// An owned array of n zeros.
template <class T>
NewVector<T> Zeros(size_t n) {
  auto values = std::make_unique<T[]>(n);
  T* data = values.get();
  nanobind::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  static_cast<void>(values.release());
  return NewVector<T>(data, {n}, owner);
}

inline void Require(bool holds, const char* message) {
  if (!holds) throw nanobind::value_error(message);
}

// Two copies into one place at a time would leave a mixture there, and each would call it whole.
inline void RequireDistinct(const std::vector<int32_t>& ids, const char* message) {
  const auto largest = ids.empty() ? 0 : *std::max_element(ids.begin(), ids.end());
  if (largest >= 0 && static_cast<size_t>(largest) < 64 * ids.size()) {
    std::vector<bool> seen(static_cast<size_t>(largest) + 1);
    for (const int32_t id : ids) {
      if (id < 0) continue;  // outside, and refused as that
      Require(!seen[static_cast<size_t>(id)], message);
      seen[static_cast<size_t>(id)] = true;
    }
    return;
  }
  std::vector<int32_t> sorted(ids);
  std::sort(sorted.begin(), sorted.end());
  Require(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), message);
}

// The caller's arrays as they were while the GIL was held: another thread may change them after.
struct OwnedRequest {
  std::vector<int32_t> block_ids;
  std::vector<int32_t> slots;
  std::vector<uint64_t> generations;
  nanobind::bytes keys;
  size_t group;

  OwnedRequest(const Vector<int32_t>& its_block_ids, const Vector<int32_t>& its_slots,
               const Vector<uint64_t>& its_generations, const nanobind::bytes& its_keys,
               size_t its_group)
      : keys(its_keys), group(its_group) {
    const size_t n = its_block_ids.size();
    Require(its_slots.size() == n && its_generations.size() == n,
            "block_ids, slots and generations must have the same length");
    Require(keys.size() == n * kKeyBytes, "keys must hold 32 bytes for each block");
    block_ids.assign(its_block_ids.data(), its_block_ids.data() + n);
    slots.assign(its_slots.data(), its_slots.data() + n);
    generations.assign(its_generations.data(), its_generations.data() + n);
  }

  CopyRequest View() const {
    return {group,        block_ids.size(),   block_ids.data(),
            slots.data(), generations.data(), reinterpret_cast<const std::byte*>(keys.c_str())};
  }
};

// The layers that register_layers() was given.
inline std::vector<Layer> LayersOf(const Vector<uint64_t>& base, const Vector<uint64_t>& stride,
                                   const Vector<uint64_t>& piece, int64_t n_blocks, size_t group) {
  Require(group < kMaxGroups, "group must be 0 to 63");
  Require(base.size() > 0 && base.size() == stride.size() && base.size() == piece.size(),
          "base, stride and piece must have the same length, at least 1");
  Require(n_blocks > 0, "n_blocks must be positive");
  std::vector<Layer> layers;
  for (size_t i = 0; i < base.size(); ++i) {
    layers.push_back(
        {reinterpret_cast<std::byte*>(base.data()[i]), stride.data()[i], piece.data()[i]});
  }
  return layers;
}

}  // namespace kvmem::bind
