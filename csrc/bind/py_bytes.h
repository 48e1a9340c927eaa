// Keys as Python's bytes.
//
// Thread safety: the GIL must be held.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>

#include "hash/sha256.h"

namespace kvmem::bind {

// New bytes with a copy of `data`, or not yet written where that is nullptr.
inline nanobind::object NewBytes(const uint8_t* data, size_t n_bytes) {
  PyObject* const made = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(data),
                                                   static_cast<Py_ssize_t>(n_bytes));
  if (made == nullptr) throw nanobind::python_error();
  return nanobind::steal(made);
}

// REQUIRES: made by NewBytes, and Python has not seen it yet.
inline uint8_t* BytesOf(nanobind::handle made) {
  return reinterpret_cast<uint8_t*>(PyBytes_AsString(made.ptr()));
}

// A list of `n` places, each to be set.
inline nanobind::object NewList(size_t n) {
  nanobind::object list = nanobind::steal(PyList_New(static_cast<Py_ssize_t>(n)));
  if (!list.is_valid()) throw nanobind::python_error();
  return list;
}

// A list of n_blocks bytes of 32.
inline nanobind::object KeyList(const uint8_t* keys, size_t n_blocks) {
  nanobind::object list = NewList(n_blocks);
  for (size_t i = 0; i < n_blocks; ++i) {
    nanobind::object key = NewBytes(keys + i * kSha256Bytes, kSha256Bytes);
    PyList_SetItem(list.ptr(), static_cast<Py_ssize_t>(i), key.release().ptr());  // steals
  }
  return list;
}

}  // namespace kvmem::bind
