// kvmem._core.TokenCursor: the core's cursor with the buffers that its calls use again.
//
// Thread safety: the GIL is its lock.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "bind/tokens.h"
#include "hash/cursor.h"

namespace kvmem::bind {

class PyCursor final {
 public:
  PyCursor(const BlockChain& chain, std::optional<ExtraKeys> first, std::optional<ExtraKeys> rest)
      : cursor_(chain, std::move(first), std::move(rest)) {}

  // How many blocks the new tokens filled.
  size_t Extend(nanobind::handle delta);
  // The same for a whole prompt; raises PrefixBroken where it isn't the old one, grown.
  size_t Sync(nanobind::handle all_tokens);

  nanobind::object Keys(int64_t start, std::optional<int64_t> stop) const;
  // The same array as before while no block was added.
  nanobind::object Packed();

  const TokenCursor& cursor() const { return cursor_; }

 private:
  // Tokens [from, end) of `tokens`; how many blocks they filled.
  size_t Append(const Tokens& tokens, size_t from);

  TokenCursor cursor_;
  std::vector<int32_t> scratch_;
  nanobind::object packed_;
  size_t n_packed_ = 0;
};

}  // namespace kvmem::bind
