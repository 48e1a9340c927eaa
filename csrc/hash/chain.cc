#include "hash/chain.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "hash/token_bytes.h"

namespace kvmem {
namespace {

using internal::TokenWriter;

static_assert(std::endian::native == std::endian::little, "a frame's length is little-endian");

// What stands around the tokens, the writer's slack, padding.
constexpr size_t kAround = 64;
constexpr size_t kPadding = 72;
constexpr size_t kMaxMessage =
    kAround + kMaxBlockTokens * internal::kMaxTokenBytes + internal::kWriterSlack + kPadding;

void Store64(uint8_t* at, uint64_t value) { std::memcpy(at, &value, sizeof(value)); }

// PROTO 5, FRAME n, SHORT_BINBYTES 32 parent, MEMOIZE, tokens, NONE, TUPLE3, MEMOIZE, STOP.
struct Pickle {
  static constexpr size_t kFrame = 11;  // where the frame's n bytes begin
  static constexpr size_t kParent = kFrame + 2;

  static uint8_t* Open(uint8_t* message, size_t n_tokens) {
    message[0] = 0x80;
    message[1] = 5;
    message[2] = 0x95;
    message[kFrame] = 'C';
    message[kFrame + 1] = kSha256Bytes;
    uint8_t* at = message + kParent + kSha256Bytes;
    *at++ = 0x94;
    if (n_tokens > 3) *at++ = '(';
    return at;
  }

  static uint8_t* Close(uint8_t* message, uint8_t* at, size_t n_tokens) {
    constexpr uint8_t kTuple[4] = {'t', 0x85, 0x86, 0x87};  // TUPLE from MARK, TUPLE1 to TUPLE3
    *at++ = kTuple[n_tokens > 3 ? 0 : n_tokens];
    std::memcpy(at, "\x94N\x87\x94.", 5);
    at += 5;
    Store64(message + 3, static_cast<uint64_t>(at - message) - kFrame);
    return at;
  }
};

// Array of 3, byte string of 32, array of tokens, null.
struct Cbor {
  static constexpr size_t kParent = 3;

  static uint8_t* Open(uint8_t* message, size_t n_tokens) {
    message[0] = 0x83;
    message[1] = 0x58;
    message[2] = kSha256Bytes;
    uint8_t* const at = message + kParent + kSha256Bytes;
    const auto n = static_cast<int32_t>(n_tokens);
    uint8_t* const end = internal::SelectCborWriter(true)(at, &n, 1);
    *at |= 0x80;  // major type 4
    return end;
  }

  static uint8_t* Close(uint8_t*, uint8_t* at, size_t) {
    *at++ = 0xF6;
    return at;
  }
};

// What stands before a message: a chain may read 16 bytes there.
constexpr size_t kBefore = 64;
constexpr size_t kBuffer = kBefore + (kMaxMessage + 63) / 64 * 64;

// A message, all but the parent in it, is written while the one before it waits for its key: the
// rounds of SHA-256 wait for one another, so there is room beside them, and its bytes have left the
// store buffer when they are read again, wider than they were written.
template <class Format>
void HashChain(Sha256Chain hash, TokenWriter write, size_t block_tokens, const int32_t* tokens,
               size_t n_blocks, const uint8_t* parent, uint8_t* keys) {
  if (n_blocks == 0) return;
  alignas(64) uint8_t buffer[2][kBuffer];
  uint8_t* const message[2] = {buffer[0] + kBefore, buffer[1] + kBefore};
  uint8_t* first[2];
  uint32_t n_message_blocks[2];
  for (size_t side = 0; side < std::min<size_t>(2, n_blocks); ++side) {
    std::memset(message[side] - 16, 0, 16);
    first[side] = Format::Open(message[side], block_tokens);
  }
  const auto prepare = [&](size_t i) {
    const size_t side = i & 1;
    uint8_t* end = write(first[side], tokens + i * block_tokens, block_tokens);
    end = Format::Close(message[side], end, block_tokens);
    const size_t n_bytes = static_cast<size_t>(end - message[side]);
    n_message_blocks[side] = static_cast<uint32_t>(Sha256Pad(message[side], n_bytes));
  };
  prepare(0);
  for (size_t i = 0; i < n_blocks; ++i, parent = keys, keys += kSha256Bytes) {
    if (i + 1 < n_blocks) prepare(i + 1);
    hash(message[i & 1], n_message_blocks[i & 1], parent, keys);
  }
}

}  // namespace

std::optional<ChainScheme> ParseChainScheme(std::string_view name) {
  for (const ChainScheme scheme : {ChainScheme::kPickle, ChainScheme::kCbor}) {
    if (name == ChainSchemeName(scheme)) return scheme;
  }
  return std::nullopt;
}

const char* ChainSchemeName(ChainScheme scheme) {
  return scheme == ChainScheme::kPickle ? "sha256" : "sha256_cbor";
}

BlockChain::BlockChain(ChainScheme scheme, size_t block_tokens,
                       const uint8_t none_hash[kSha256Bytes], Sha256Path path)
    : scheme_(scheme),
      block_tokens_(block_tokens),
      compress_(SelectSha256(path)),
      hash_messages_(scheme == ChainScheme::kPickle ? SelectSha256Chain<Pickle::kParent>(path)
                                                    : SelectSha256Chain<Cbor::kParent>(path)),
      write_(scheme == ChainScheme::kPickle
                 ? internal::SelectPickleWriter(path == Sha256Path::kPortable)
                 : internal::SelectCborWriter(path == Sha256Path::kPortable)) {
  std::memcpy(none_hash_, none_hash, kSha256Bytes);
}

void BlockChain::Hash(const int32_t* tokens, size_t n_blocks, const uint8_t* parent,
                      uint8_t* keys) const {
  if (parent == nullptr) parent = none_hash_;
  const auto hash = scheme_ == ChainScheme::kPickle ? HashChain<Pickle> : HashChain<Cbor>;
  hash(hash_messages_, write_, block_tokens_, tokens, n_blocks, parent, keys);
}

void BlockChain::HashWith(const ExtraKeys& extra, const int32_t* tokens, const uint8_t* parent,
                          uint8_t* key) const {
  const BlockView block{parent == nullptr ? none_hash_ : parent, tokens, block_tokens_, extra};
  std::vector<uint8_t> encoded;
  scheme_ == ChainScheme::kPickle ? EncodePickle(block, &encoded) : EncodeCbor(block, &encoded);
  const size_t n_bytes = encoded.size();
  encoded.resize(n_bytes + kPadding);
  uint32_t state[8];
  std::copy(kSha256Init, kSha256Init + 8, state);
  compress_(state, encoded.data(), Sha256Pad(encoded.data(), n_bytes));
  Sha256Store(state, key);
}

}  // namespace kvmem
