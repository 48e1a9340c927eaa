#include "hash/cursor.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvmem {
namespace {

constexpr size_t kFirstBlocks = 64;

// A prompt that comes whole will grow by small steps: room for half as much again from the start.
size_t WithRoom(size_t n) { return n + n / 2; }

}  // namespace

TokenCursor::TokenCursor(const BlockChain& chain, std::optional<ExtraKeys> first,
                         std::optional<ExtraKeys> rest)
    : chain_(chain), first_(std::move(first)), rest_(std::move(rest)) {
  ReserveBlocks(kFirstBlocks);
}

void TokenCursor::Extend(const int32_t* tokens, size_t n) {
  const size_t block_tokens = chain_.block_tokens();
  const size_t n_blocks = (tokens_.size() + n) / block_tokens;
  ReserveBlocks(n_blocks);
  const size_t n_tokens = tokens_.size() + n;
  if (n_tokens > tokens_.capacity()) tokens_.reserve(WithRoom(n_tokens));
  tokens_.insert(tokens_.end(), tokens, tokens + n);
  try {
    HashBlocks(n_blocks_, n_blocks);
  } catch (...) {  // extra keys take memory to write
    tokens_.resize(n_tokens - n);
    throw;
  }
  n_blocks_ = n_blocks;
}

void TokenCursor::HashBlocks(size_t from, size_t to) {
  for (size_t block = from; block < to;) {
    const std::optional<ExtraKeys>& extra = block == 0 ? first_ : rest_;
    uint8_t* const key = keys_.get() + block * kSha256Bytes;
    const uint8_t* const parent = block == 0 ? nullptr : key - kSha256Bytes;
    const int32_t* const tokens = tokens_.data() + block * chain_.block_tokens();
    if (extra) {
      chain_.HashWith(*extra, tokens, parent, key);
      ++block;
    } else {
      const size_t stop = rest_ || (block == 0 && first_) ? block + 1 : to;
      chain_.Hash(tokens, stop - block, parent, key);
      block = stop;
    }
  }
}

size_t TokenCursor::Mismatch(size_t from, const int32_t* tokens, size_t n) const {
  const int32_t* const own = tokens_.data() + from;
  if (n == 0 || std::memcmp(own, tokens, n * sizeof(*own)) == 0) return n;
  return static_cast<size_t>(std::mismatch(own, own + n, tokens).first - own);
}

void TokenCursor::ReserveBlocks(size_t n_blocks) {
  if (n_blocks <= capacity_blocks_) return;
  const size_t capacity = WithRoom(n_blocks);
  auto keys = std::make_shared_for_overwrite<uint8_t[]>(capacity * kSha256Bytes);
  if (n_blocks_ != 0) std::memcpy(keys.get(), keys_.get(), n_blocks_ * kSha256Bytes);
  keys_ = std::move(keys);
  capacity_blocks_ = capacity;
}

}  // namespace kvmem
