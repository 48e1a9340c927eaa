// The tokens of one growing prompt and the keys of its whole blocks; each block is hashed once.
//
// Thread safety: one thread at a time. What keys() gave stays valid and unchanged whatever follows.
//
// 1. n_blocks() == n_tokens() / block_tokens: the rest waits for the tokens that fill its block.
// 2. Tokens and keys are only ever added to the end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "hash/chain.h"

namespace kvmem {

class TokenCursor {
 public:
  // `first` are the extra keys of block 0 (an adapter's and a cache salt), `rest` those of each
  // later block (the adapter's); nullopt for none.
  explicit TokenCursor(const BlockChain& chain, std::optional<ExtraKeys> first = std::nullopt,
                       std::optional<ExtraKeys> rest = std::nullopt);

  // Adds tokens to the end and hashes the blocks they fill. An exception (no memory) leaves the
  // cursor as it was. REQUIRES: no token is negative.
  void Extend(const int32_t* tokens, size_t n);

  // The first i < n where tokens[i] isn't the cursor's token `from + i`; n when all are the same.
  // REQUIRES: from + n <= n_tokens().
  size_t Mismatch(size_t from, const int32_t* tokens, size_t n) const;

  size_t n_tokens() const { return tokens_.size(); }
  size_t n_blocks() const { return n_blocks_; }
  size_t block_tokens() const { return chain_.block_tokens(); }

  // 32 * n_blocks() bytes. Growth moves to a new buffer and leaves the old one to those who hold
  // it.
  std::shared_ptr<const uint8_t[]> keys() const { return keys_; }

 private:
  void ReserveBlocks(size_t n_blocks);
  void HashBlocks(size_t from, size_t to);

  // Immutable.
  const BlockChain chain_;
  const std::optional<ExtraKeys> first_;
  const std::optional<ExtraKeys> rest_;

  // The one thread's.
  std::vector<int32_t> tokens_;
  std::shared_ptr<uint8_t[]> keys_;
  size_t n_blocks_ = 0;
  size_t capacity_blocks_ = 0;
};

}  // namespace kvmem
