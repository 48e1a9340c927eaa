#include "bind/tokens.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace kvmem::bind {
namespace nb = nanobind;
namespace {

// CPython 3.10 to 3.14 with a GIL (Include/cpython/longintrepr.h, listobject.h). `tag` holds the
// number of digits and the sign, in a coding that changed with 3.12.
struct IntObject {
  Py_ssize_t references;
  PyTypeObject* type;
  uintptr_t tag;
  uint32_t digit;
};

struct ListObject {
  Py_ssize_t references;
  PyTypeObject* type;
  Py_ssize_t size;
  PyObject** items;
  Py_ssize_t allocated;
};

constexpr size_t kAtOnce = 8;  // elements

bool g_found = false;       // lists can be read in place
bool g_in_place = false;    // and they are
uintptr_t g_one_digit = 0;  // the tag of a positive int of one digit

const IntObject* AsInt(PyObject* object) { return reinterpret_cast<const IntObject*>(object); }

bool IsOneDigit(PyObject* object) {
  return AsInt(object)->type == &PyLong_Type && AsInt(object)->tag == g_one_digit;
}

// The digits of kAtOnce objects; false if one is no int of one digit, and then `out` is no matter.
// One branch for all and not one for each: 0.3 ns less an element. Only what is an int for sure has
// a tag and a digit to look at.
bool ReadDigits(PyObject* const* items, int32_t* out) {
  uintptr_t other = 0;
  for (size_t i = 0; i < kAtOnce; ++i) {
    other |= reinterpret_cast<uintptr_t>(AsInt(items[i])->type) ^
             reinterpret_cast<uintptr_t>(&PyLong_Type);
  }
  if (other != 0) return false;
  for (size_t i = 0; i < kAtOnce; ++i) {
    other |= AsInt(items[i])->tag ^ g_one_digit;
    out[i] = static_cast<int32_t>(AsInt(items[i])->digit);
  }
  return other == 0;
}

[[noreturn]] void RaiseType(size_t i, PyObject* item) {
  const std::string type = nb::str(nb::getattr(nb::handle(item).type(), "__name__")).c_str();
  throw nb::type_error(("tokens[" + std::to_string(i) + "] must be an int, not " + type).c_str());
}

[[noreturn]] void RaiseRange(size_t i, const std::string& value) {
  throw nb::value_error(
      ("tokens[" + std::to_string(i) + "] must be within 0..2147483647, not " + value).c_str());
}

[[noreturn, gnu::cold, gnu::noinline]] void RaiseShrunk() {
  PyErr_SetString(PyExc_RuntimeError, "tokens shrank while they were read");
  throw nb::python_error();
}

int32_t ReadItem(size_t i, PyObject* item) {
  if (Py_TYPE(item) != &PyLong_Type) RaiseType(i, item);
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
  if (overflow != 0 || value < 0 || value > INT32_MAX) RaiseRange(i, nb::str(item).c_str());
  return static_cast<int32_t>(value);
}

Py_ssize_t SizeAttribute(nb::handle type, const char* name) {
  return nb::cast<Py_ssize_t>(nb::getattr(type, name));
}

bool SizesAreKnown() {
  const nb::handle integer(reinterpret_cast<PyObject*>(&PyLong_Type));
  const nb::handle list(reinterpret_cast<PyObject*>(&PyList_Type));
  return SizeAttribute(integer, "__basicsize__") == offsetof(IntObject, digit) &&
         SizeAttribute(integer, "__itemsize__") == sizeof(uint32_t) &&
         SizeAttribute(list, "__basicsize__") == sizeof(ListObject);
}

bool VersionIsKnown() {
  const auto version = nb::cast<uint32_t>(nb::module_::import_("sys").attr("hexversion"));
  return version >= 0x030A0000 && version < 0x030F0000;
}

// Whether ints and a list with known contents read as they should.
bool SelfTest() {
  // One digit, and above the range that CPython 3.14 marks as immortal.
  constexpr long long kOneDigit[] = {1000, 65535, 65536, 151643, (1LL << 30) - 1};
  constexpr long long kOther[] = {0, -1, -1000, 1LL << 30, (1LL << 31) - 1, 1LL << 31, 1LL << 40};
  nb::list list;
  for (const long long value : kOneDigit) list.append(nb::int_(value));
  for (const long long value : kOther) list.append(nb::int_(value));
  list.append(nb::bool_(true));

  const auto* const object = reinterpret_cast<const ListObject*>(list.ptr());
  if (object->type != &PyList_Type || object->size != PyList_Size(list.ptr())) return false;
  for (Py_ssize_t i = 0; i < object->size; ++i) {
    if (object->items[i] != PyList_GetItem(list.ptr(), i)) return false;
  }
  g_one_digit = AsInt(object->items[0])->tag;
  Py_ssize_t at = 0;
  for (const long long value : kOneDigit) {
    PyObject* const item = object->items[at++];
    if (!IsOneDigit(item) || AsInt(item)->digit != value) return false;
  }
  for (; at < object->size; ++at) {
    if (IsOneDigit(object->items[at])) return false;
  }
  return true;
}

}  // namespace

Tokens::Tokens(nb::handle source) {
  if (PyList_Check(source.ptr())) {
    list_ = source.ptr();
    n_ = static_cast<size_t>(PyList_Size(list_));
  } else if (nb::try_cast(source, array_, false)) {
    n_ = array_.size();
  } else {
    const std::string type = nb::str(nb::getattr(source.type(), "__name__")).c_str();
    throw nb::type_error(
        ("tokens must be a list of int or a contiguous int32 array [n], not " + type).c_str());
  }
}

const int32_t* Tokens::Read(size_t from, size_t n, std::vector<int32_t>& scratch) const {
  if (list_ != nullptr) {
    if (scratch.size() < n) scratch.resize(n);
    ReadList(from, n, scratch.data());
    return scratch.data();
  }
  const int32_t* const tokens = array_.data() + from;
  CheckRange(tokens, from, n);
  return tokens;
}

const int32_t* Tokens::Copy(size_t from, size_t n, std::vector<int32_t>& scratch) const {
  if (list_ != nullptr) return Read(from, n, scratch);
  scratch.assign(array_.data() + from, array_.data() + from + n);
  CheckRange(scratch.data(), from, n);
  return scratch.data();
}

void Tokens::CheckRange(const int32_t* tokens, size_t from, size_t n) {
  int32_t all = 0;
  for (size_t i = 0; i < n; ++i) all |= tokens[i];
  for (size_t i = 0; all < 0; ++i) {
    if (tokens[i] < 0) RaiseRange(from + i, std::to_string(tokens[i]));
  }
}

void Tokens::ReadList(size_t from, size_t n, int32_t* out) const {
  // A collection or a destructor may have run Python since this was made. None runs below.
  if (!g_in_place) {
    if (from + n > static_cast<size_t>(PyList_Size(list_))) RaiseShrunk();
    for (size_t i = 0; i < n; ++i) {
      out[i] = ReadItem(from + i, PyList_GetItem(list_, static_cast<Py_ssize_t>(from + i)));
    }
    return;
  }
  const auto* const list = reinterpret_cast<const ListObject*>(list_);
  if (from + n > static_cast<size_t>(list->size)) RaiseShrunk();
  PyObject* const* const items = list->items + from;
  // Eight are read as if each had one digit, and looked at one by one if any hasn't.
  for (size_t i = 0; i < n; i += kAtOnce) {
    const size_t end = std::min(n, i + kAtOnce);
    if (end - i == kAtOnce && ReadDigits(items + i, out + i)) continue;
    for (size_t j = i; j < end; ++j) out[j] = ReadItem(from + j, items[j]);
  }
}

void FindListReader() {
  g_found = VersionIsKnown() && SizesAreKnown() && SelfTest();
  g_in_place = g_found;
}

const char* ListReader(const char* name) {
  if (*name != '\0') {
    const bool in_place = std::strcmp(name, "in place") == 0;
    if (!in_place && std::strcmp(name, "abi3") != 0) {
      throw nb::value_error("name must be 'in place' or 'abi3'");
    }
    if (in_place && !g_found) {
      throw nb::value_error("this Python's lists cannot be read in place; use 'abi3'");
    }
    g_in_place = in_place;
  }
  return g_in_place ? "in place" : "abi3";
}

}  // namespace kvmem::bind
