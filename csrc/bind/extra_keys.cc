#include "bind/extra_keys.h"

#include <array>
#include <string>

namespace kvmem::bind {
namespace nb = nanobind;
namespace {

using Kind = ExtraNode::Kind;

constexpr int kMaxDepth = 8;
constexpr const char* kTagNames[] = {"lora", "mm", "cache_salt", "prompt_embeds"};
std::array<PyObject*, 4> g_tags;  // interned; written at import, kept for good

std::string TypeName(nb::handle value) {
  return nb::str(nb::getattr(value.type(), "__name__")).c_str();
}

uint64_t Identity(PyObject* object) { return reinterpret_cast<uintptr_t>(object); }

PyObject* TagOf(PyObject* text) {
  for (PyObject* const tag : g_tags) {
    if (text == tag || PyUnicode_Compare(text, tag) == 0) return tag;
  }
  return nullptr;
}

// UTF-8; a lone surrogate is three bytes in a pickle and an error in CBOR.
std::string Utf8(nb::handle text, const char* where, ChainScheme scheme) {
  const char* const errors = scheme == ChainScheme::kPickle ? "surrogatepass" : "strict";
  const nb::object encoded = nb::steal(PyUnicode_AsEncodedString(text.ptr(), "utf-8", errors));
  if (!encoded.is_valid()) {
    PyErr_Clear();
    throw nb::value_error(
        (std::string(where) + " holds a lone surrogate, which CBOR cannot").c_str());
  }
  const auto n = static_cast<size_t>(PyBytes_Size(encoded.ptr()));
  if (n > UINT32_MAX) throw nb::value_error((std::string(where) + " is above 4 GiB").c_str());
  return {PyBytes_AsString(encoded.ptr()), n};
}

class Parser {
 public:
  Parser(const char* where, ChainScheme scheme) : where_(where), scheme_(scheme) {}

  void Value(nb::handle value, int depth, bool may_be_tag) {
    PyObject* const object = value.ptr();
    ExtraNode node;
    if (value.is_none()) {
      node.kind = Kind::kNone;
    } else if (PyUnicode_CheckExact(object)) {
      PyObject* const tag = may_be_tag ? TagOf(object) : nullptr;
      node = {.kind = Kind::kText,
              .identity = Identity(tag != nullptr ? tag : object),
              .bytes = Utf8(value, where_, scheme_)};
    } else if (PyBytes_CheckExact(object)) {
      node = {.kind = Kind::kBytes,
              .identity = Identity(object),
              .bytes = {PyBytes_AsString(object), static_cast<size_t>(PyBytes_Size(object))}};
    } else if (Py_TYPE(object) == &PyBool_Type) {
      node.kind = object == Py_True ? Kind::kTrue : Kind::kFalse;
    } else if (PyLong_CheckExact(object)) {
      node = {.kind = Kind::kInt, .number = Int(object)};
    } else if (PyTuple_CheckExact(object)) {
      return Tuple(object, depth);
    } else {
      throw nb::type_error((std::string(where_) +
                            " may hold str, bytes, int, bool, None and tuples of them, not " +
                            TypeName(value))
                               .c_str());
    }
    keys.push_back(std::move(node));
  }

  ExtraKeys keys;

 private:
  void Tuple(PyObject* tuple, int depth) {
    if (depth == kMaxDepth) {
      throw nb::value_error(
          (std::string(where_) + " is nested deeper than " + std::to_string(kMaxDepth)).c_str());
    }
    const Py_ssize_t n = PyTuple_Size(tuple);
    keys.push_back({.kind = Kind::kTuple, .number = n, .identity = Identity(tuple)});
    for (Py_ssize_t i = 0; i < n; ++i) {
      Value(PyTuple_GetItem(tuple, i), depth + 1, depth == 1 && i == 0);
    }
  }

  int64_t Int(PyObject* object) const {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow != 0) {
      throw nb::value_error((std::string(where_) + " holds an int beyond 64 bits").c_str());
    }
    return number;
  }

  const char* const where_;
  const ChainScheme scheme_;
};

}  // namespace

void InitExtraKeys() {
  for (size_t i = 0; i < g_tags.size(); ++i) {
    g_tags[i] = PyUnicode_InternFromString(kTagNames[i]);
    if (g_tags[i] == nullptr) throw nb::python_error();
  }
}

std::optional<ExtraKeys> ParseExtraKeys(nb::handle value, const char* where, ChainScheme scheme) {
  if (value.is_none()) return std::nullopt;
  if (!PyTuple_CheckExact(value.ptr())) {
    throw nb::type_error(
        (std::string(where) + " must be a tuple or None, not " + TypeName(value)).c_str());
  }
  Parser parser(where, scheme);
  parser.Value(value, 0, false);
  return std::move(parser.keys);
}

}  // namespace kvmem::bind
