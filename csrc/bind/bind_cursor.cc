// kvmem._core.TokenCursor.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <string>

#include "bind/bind.h"
#include "bind/cursor.h"
#include "bind/extra_keys.h"
#include "bind/py_bytes.h"

namespace kvmem::bind {
namespace nb = nanobind;
namespace {

// In pieces that stay in the first cache.
constexpr size_t kPiece = 2048;

[[noreturn]] void RaiseBroken(const std::string& message, size_t index) {
  const nb::object error = nb::module_::import_("kvmem.errors").attr("PrefixBroken");
  const nb::object raised =
      error(message, nb::arg("next_step") = "Start a new cursor for a prompt that was rewritten.",
            nb::arg("index") = index);
  PyErr_SetObject(error.ptr(), raised.ptr());
  throw nb::python_error();
}

void Make(PyCursor* at, const BlockChain& chain, nb::handle extra_keys,
          nb::handle first_extra_keys) {
  auto rest = ParseExtraKeys(extra_keys, "extra_keys", chain.scheme());
  auto first = first_extra_keys.is_none()
                   ? rest
                   : ParseExtraKeys(first_extra_keys, "first_extra_keys", chain.scheme());
  new (at) PyCursor(chain, std::move(first), std::move(rest));
}

}  // namespace

size_t PyCursor::Extend(nb::handle source) {
  const Tokens tokens(source);
  return Append(tokens, 0);
}

size_t PyCursor::Sync(nb::handle source) {
  const Tokens tokens(source);
  const size_t n_common = std::min(tokens.size(), cursor_.n_tokens());
  for (size_t from = 0; from < n_common; from += kPiece) {
    const size_t n = std::min(kPiece, n_common - from);
    const size_t same = cursor_.Mismatch(from, tokens.Read(from, n, scratch_), n);
    if (same != n) {
      const size_t index = from + same;
      RaiseBroken("token " + std::to_string(index) + " of " + std::to_string(n_common) +
                      " that were hashed before has changed",
                  index);
    }
  }
  if (n_common != cursor_.n_tokens()) {
    RaiseBroken(std::to_string(tokens.size()) + " tokens are fewer than the " +
                    std::to_string(cursor_.n_tokens()) + " that were hashed before",
                n_common);
  }
  return Append(tokens, n_common);
}

nb::object PyCursor::Keys(int64_t start, std::optional<int64_t> stop) const {
  const auto n = static_cast<int64_t>(cursor_.n_blocks());
  const int64_t to = stop.value_or(n);
  if (start < 0 || start > to || to > n) {
    throw nb::value_error(("start and stop must hold 0 <= start <= stop <= " + std::to_string(n) +
                           " (n_blocks), not " + std::to_string(start) + " and " +
                           std::to_string(to))
                              .c_str());
  }
  return KeyList(cursor_.keys().get() + static_cast<size_t>(start) * kSha256Bytes,
                 static_cast<size_t>(to - start));
}

nb::object PyCursor::Packed() {
  if (!packed_.is_valid() || n_packed_ != cursor_.n_blocks()) {
    using Array = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>, nb::c_contig>;
    using Owner = std::shared_ptr<const uint8_t[]>;
    auto owned = std::make_unique<Owner>(cursor_.keys());
    const uint8_t* const data = owned->get();
    const nb::capsule owner(owned.get(), [](void* p) noexcept { delete static_cast<Owner*>(p); });
    static_cast<void>(owned.release());
    packed_ = nb::cast(Array(data, {cursor_.n_blocks() * kSha256Bytes}, owner));
    n_packed_ = cursor_.n_blocks();
  }
  return packed_;
}

size_t PyCursor::Append(const Tokens& tokens, size_t from) {
  const size_t n = tokens.size() - from;
  const size_t before = cursor_.n_blocks();
  cursor_.Extend(tokens.Read(from, n, scratch_), n);
  return cursor_.n_blocks() - before;
}

#define TOKENS "list[int] | numpy.typing.NDArray[numpy.int32]"

void RegisterCursor(nb::module_& m) {
  using nb::arg;
  nb::class_<PyCursor>(m, "TokenCursor",
                       "The tokens of one growing prompt and the keys of its whole blocks; each "
                       "block is hashed once.\n\n"
                       "Calls hold the GIL; the hasher may go.")
      .def("__init__", &Make, arg("hasher"), nb::kw_only(), arg("extra_keys") = nb::none(),
           arg("first_extra_keys") = nb::none(),
           nb::sig("def __init__(self, hasher: BlockHasher, *, extra_keys: tuple[object, ...] | "
                   "None = None, first_extra_keys: tuple[object, ...] | None = None) -> None"),
           "An empty prompt. Every block has `extra_keys` (an adapter's); block 0 has "
           "`first_extra_keys`\nwhere they are given (the adapter's and a cache salt).")
      .def("extend", &PyCursor::Extend, arg("delta"),
           nb::sig("def extend(self, delta: " TOKENS ") -> int"),
           "Adds tokens to the end; answers how many blocks they filled.\n\n"
           "Raises:\n    TypeError: a token is no int; nothing was added.\n"
           "    ValueError: a token is outside 0..2^31-1; nothing was added.")
      .def("sync", &PyCursor::Sync, arg("all_tokens"),
           nb::sig("def sync(self, all_tokens: " TOKENS ") -> int"),
           "Takes the whole prompt, adds what is new; answers how many blocks that filled.\n\n"
           "Raises:\n    PrefixBroken: the prompt does not begin with the cursor's tokens; "
           "`index` is the first\n        that differs or is missing. The cursor is unchanged.\n"
           "    TypeError, ValueError: as `extend`.")
      .def("keys", &PyCursor::Keys, arg("start") = 0, arg("stop") = nb::none(),
           nb::sig("def keys(self, start: int = 0, stop: int | None = None) -> list[bytes]"),
           "The 32-byte keys of blocks [start, stop); to the last by default.\n\n"
           "Raises:\n    ValueError: not 0 <= start <= stop <= n_blocks.")
      .def_prop_ro("packed", &PyCursor::Packed,
                   nb::sig("def packed(self) -> numpy.typing.NDArray[numpy.uint8]"),
                   "All keys as one read-only array [n_blocks*32], not copied.\n\n"
                   "Stays valid and as it is when the cursor grows; ask again for the new keys.")
      .def_prop_ro("n_tokens", [](const PyCursor& c) { return c.cursor().n_tokens(); })
      .def_prop_ro("n_blocks", [](const PyCursor& c) { return c.cursor().n_blocks(); })
      .def("__repr__", [](const PyCursor& c) {
        const TokenCursor& cursor = c.cursor();
        return "<TokenCursor " + std::to_string(cursor.n_tokens()) + " tokens, " +
               std::to_string(cursor.n_blocks()) + " blocks of " +
               std::to_string(cursor.block_tokens()) + ">";
      });
}

}  // namespace kvmem::bind
