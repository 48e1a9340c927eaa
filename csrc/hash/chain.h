// The engine's block keys, bit for bit: a chain of SHA-256 over (parent, tokens, extra keys).
//
// A block's key is the digest of the serialised tuple of its parent's key, its token ids and its
// extra keys, None for most (vLLM, v1/core/kv_cache_utils.py: hash_block_tokens). The serialisation
// is Python's pickle, protocol 5 (PEP 3154, PEP 574 and Lib/pickletools.py), or canonical CBOR (RFC
// 8949, section 4.2). Both are written straight into the buffer that is then padded and hashed.
//
// Thread safety: a BlockChain never changes.
//
// 1. Key i depends on parent, on tokens [0, (i + 1) * block_tokens) and on the extra keys of blocks
//    [0, i], and on nothing else.
// 2. A pickle without extra keys is one frame: 4,096 tokens take 20,532 bytes, a frame is closed at
// 65,536.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "hash/extra_keys.h"
#include "hash/sha256.h"
#include "hash/token_bytes.h"

namespace kvmem {

enum class ChainScheme { kPickle, kCbor };

// "sha256" or "sha256_cbor", the engine's names; nullopt for any other word.
std::optional<ChainScheme> ParseChainScheme(std::string_view name);
const char* ChainSchemeName(ChainScheme scheme);

inline constexpr size_t kMaxBlockTokens = 4096;

class BlockChain {
 public:
  // `none_hash` is the parent of a first block. REQUIRES: 1 <= block_tokens <= kMaxBlockTokens, and
  // this CPU has `path`. kPortable
  // uses no special instructions for the serialisation either.
  BlockChain(ChainScheme scheme, size_t block_tokens, const uint8_t none_hash[kSha256Bytes],
             Sha256Path path = Sha256Path::kAuto);

  // Writes the keys of the blocks in tokens [0, n_blocks * block_tokens) to keys
  // [0, n_blocks * 32). `parent` is the key before the first of them, nullptr for the first of all;
  // it may lie right before `keys`. REQUIRES: no token is negative.
  void Hash(const int32_t* tokens, size_t n_blocks, const uint8_t* parent, uint8_t* keys) const;

  // Writes the key of the one block tokens [0, block_tokens) with extra keys to key [0, 32), which
  // may not overlap `parent`.
  void HashWith(const ExtraKeys& extra, const int32_t* tokens, const uint8_t* parent,
                uint8_t* key) const;

  ChainScheme scheme() const { return scheme_; }
  size_t block_tokens() const { return block_tokens_; }
  const uint8_t* none_hash() const { return none_hash_; }

 private:
  // Immutable.
  ChainScheme scheme_;
  size_t block_tokens_;
  Sha256Compress compress_;
  Sha256Chain hash_messages_;
  internal::TokenWriter write_;
  uint8_t none_hash_[kSha256Bytes];
};

}  // namespace kvmem
