#include "bind/keys.h"

#include <string>

#include "bind/cursor.h"

namespace kvmem::bind {
namespace nb = nanobind;
namespace {

std::string TypeName(nb::handle value) {
  return nb::str(nb::getattr(value.type(), "__name__")).c_str();
}

[[noreturn]] void RaiseUneven(size_t n_bytes) {
  throw nb::value_error(("packed keys must be n*32 bytes, not " + std::to_string(n_bytes)).c_str());
}

}  // namespace

Keys::Opened Keys::Open(nb::handle source) {
  Opened opened;
  if (PyList_Check(source.ptr())) {
    opened.list = source.ptr();
    opened.n = static_cast<size_t>(PyList_Size(source.ptr()));
    return opened;
  }
  size_t n_bytes = 0;
  if (PyBytes_Check(source.ptr())) {
    n_bytes = static_cast<size_t>(PyBytes_Size(source.ptr()));
    opened.packed = reinterpret_cast<const uint8_t*>(PyBytes_AsString(source.ptr()));
  } else if (nb::isinstance<PyCursor>(source)) {
    const TokenCursor& cursor = nb::inst_ptr<PyCursor>(source)->cursor();
    n_bytes = cursor.n_blocks() * kKeyBytes;
    opened.packed = cursor.keys().get();
  } else if (nb::try_cast(source, opened.array, false)) {
    const size_t n_dims = opened.array.ndim();
    if (n_dims < 1 || n_dims > 2 || (n_dims == 2 && opened.array.shape(1) != kKeyBytes)) {
      throw nb::value_error("packed keys must have the shape [n*32] or [n, 32]");
    }
    n_bytes = opened.array.size();
    opened.packed = opened.array.data();
  } else {
    throw nb::type_error(
        ("keys must be a list of 32-byte bytes, a TokenCursor, bytes of n*32, or a contiguous "
         "uint8 array, not " +
         TypeName(source))
            .c_str());
  }
  if (n_bytes % kKeyBytes != 0) RaiseUneven(n_bytes);
  opened.n = n_bytes / kKeyBytes;
  return opened;
}

Key Keys::FromList(size_t i) const {
  PyObject* const item = PyList_GetItem(list_, static_cast<Py_ssize_t>(i));  // borrowed
  if (item == nullptr || !PyBytes_Check(item) ||
      PyBytes_Size(item) != static_cast<Py_ssize_t>(kKeyBytes)) {
    if (!bad_) bad_ = i;
    return Key{};
  }
  return LoadKey(PyBytes_AsString(item));
}

void Keys::Require(size_t from, size_t to) const {
  if (list_ == nullptr) return;
  for (size_t i = from; i < to; ++i) FromList(i);
  RaiseIfBad();
}

void Keys::RaiseIfBad() const {
  if (!bad_) return;
  const std::string name = "keys[" + std::to_string(*bad_) + "]";
  const nb::handle item = PyList_GetItem(list_, static_cast<Py_ssize_t>(*bad_));
  if (!item.is_valid()) throw nb::python_error();
  if (!PyBytes_Check(item.ptr())) {
    throw nb::type_error((name + " must be bytes, not " + TypeName(item)).c_str());
  }
  const std::string n = std::to_string(PyBytes_Size(item.ptr()));
  throw nb::value_error((name + " must have 32 bytes, not " + n).c_str());
}

}  // namespace kvmem::bind
