// The keys of one prompt as Python hands them over: a list of 32-byte bytes (an engine's
// request.block_hashes), or packed: a TokenCursor's, bytes of n*32, a uint8 array [n*32] or [n,
// 32].
//
// A list is read in place and only where the operation looks: a match over 840 keys looks at about
// ten. A wrong element can't be refused before it is looked at, so it reads as a key that is not
// there, and RaiseIfBad() after the operation says which one it was.
//
// Thread safety: the GIL must be held as long as a Keys lives.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>

#include "index/key.h"

namespace kvmem::bind {

class Keys final : public KeyList {
 public:
  // Raises TypeError or ValueError for what is no list of keys. `source` must outlive this.
  explicit Keys(nanobind::handle source) : Keys(Open(source)) {}

  Key At(size_t i) const override {
    return packed_ != nullptr ? LoadKey(packed_ + i * kKeyBytes) : FromList(i);
  }

  // Looks at keys[from, to) now, for operations that must not stop half-way.
  void Require(size_t from, size_t to) const;
  void RaiseIfBad() const;

 private:
  using Array = nanobind::ndarray<const uint8_t, nanobind::c_contig, nanobind::device::cpu>;
  struct Opened {
    size_t n = 0;
    const uint8_t* packed = nullptr;
    PyObject* list = nullptr;
    Array array;
  };

  explicit Keys(Opened opened)
      : KeyList(opened.n), packed_(opened.packed), list_(opened.list), array_(opened.array) {}
  static Opened Open(nanobind::handle source);
  Key FromList(size_t i) const;

  const uint8_t* const packed_;
  PyObject* const list_;
  const Array array_;  // keeps an array's memory
  mutable std::optional<size_t> bad_;
};

}  // namespace kvmem::bind
