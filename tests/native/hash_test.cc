// The hash room on exact-size heap buffers, so that a byte too far is seen by ASan. Expected values
// are those of Python's hashlib, pickle, cbor2 and xxhash over the same bytes and tokens.
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "hash/chain.h"
#include "hash/cursor.h"
#include "hash/extra_keys.h"
#include "hash/sha256.h"
#include "hash/xxh3.h"
#include "hash/xxh3_stream.h"

namespace kvmem {
namespace {

constexpr uint8_t kNone[kSha256Bytes] = {};

// Knuth's MMIX generator; the top byte of each state.
struct Random {
  uint64_t state = 1;
  uint64_t Next() { return state = state * 6364136223846793005u + 1442695040888963407u; }
  uint8_t Byte() { return static_cast<uint8_t>(Next() >> 56); }
  size_t Below(size_t n) { return static_cast<size_t>((Next() >> 33) % n); }
};

std::string Hex(const uint8_t* bytes, size_t n) {
  std::string out;
  for (size_t i = 0; i < n; ++i) {
    for (const int shift : {4, 0}) out += "0123456789abcdef"[(bytes[i] >> shift) & 15];
  }
  return out;
}

// `n` of anything in memory of its own with nothing behind it.
template <typename T>
std::unique_ptr<T[]> Exact(const T* from, size_t n) {
  auto copy = std::make_unique<T[]>(n);
  if (n != 0) std::memcpy(copy.get(), from, n * sizeof(T));
  return copy;
}

std::unique_ptr<int32_t[]> Tokens(size_t n, size_t block_tokens) {
  auto tokens = std::make_unique<int32_t[]>(n);
  for (size_t i = 0; i < n; ++i) {
    const uint64_t bits = (i * 5 + block_tokens) % 31 + 1;
    tokens[i] = static_cast<int32_t>((i * i * 7919 + block_tokens) % (uint64_t{1} << bits));
  }
  return tokens;
}

std::string SecondKey(ChainScheme scheme, size_t block_tokens, Sha256Path path) {
  const auto tokens = Tokens(2 * block_tokens, block_tokens);
  const auto keys = std::make_unique<uint8_t[]>(2 * kSha256Bytes);
  BlockChain(scheme, block_tokens, kNone, path).Hash(tokens.get(), 2, nullptr, keys.get());
  return Hex(keys.get() + kSha256Bytes, kSha256Bytes);
}

void Sha256OfAbc() {
  for (const Sha256Path path : {Sha256Path::kAuto, Sha256Path::kShaNi, Sha256Path::kPortable}) {
    const Sha256Compress compress = SelectSha256(path);
    if (compress == nullptr) continue;
    uint8_t message[3 + 72] = {'a', 'b', 'c'};
    uint32_t state[8];
    std::memcpy(state, kSha256Init, sizeof state);
    const size_t n_blocks = Sha256Pad(message, 3);
    CHECK(n_blocks == 1);
    compress(state, message, n_blocks);
    uint8_t digest[kSha256Bytes];
    Sha256Store(state, digest);
    CHECK(Hex(digest, sizeof digest) ==
          "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  }
}

void KeysAreThoseOfPythonsLibraries() {
  const struct {
    ChainScheme scheme;
    size_t block_tokens;
    const char* key;
  } cases[] = {
      {ChainScheme::kPickle, 1, "74351eb72ea3a2ab00b6143d7e0172db45788eff3e3e59724a0fcc5476297534"},
      {ChainScheme::kPickle, 16,
       "3a8bd92f36ccba6697346c36c0ca8506c72a9b27ed4ee6bedfbad0856d467511"},
      {ChainScheme::kPickle, 4096,
       "7d7507bfc045e6e628c0634bdf24983ca00a72b2d82f1575dc87cbe2337d22e9"},
      {ChainScheme::kCbor, 1, "0e087a6e57c6da10c5c0f2fbc3c49b72f9511b0d7390488560085c205947e53d"},
      {ChainScheme::kCbor, 16, "2ccbd24ab98bc383414968d159c83fa56d7f412d730a3f8c860b23585521f1ed"},
      {ChainScheme::kCbor, 4096,
       "33f48ecc809d19db3dcdda79ba4c761203c56f68bcf03c7f8eba85da5f8a6aaa"},
  };
  for (const auto& c : cases) {
    CHECK(SecondKey(c.scheme, c.block_tokens, Sha256Path::kPortable) == c.key);
    CHECK(SecondKey(c.scheme, c.block_tokens, Sha256Path::kAuto) == c.key);
  }
}

void PathsAgreeAtEveryBlockSize() {
  for (const ChainScheme scheme : {ChainScheme::kPickle, ChainScheme::kCbor}) {
    for (size_t block_tokens = 1; block_tokens <= 300; ++block_tokens) {
      CHECK(SecondKey(scheme, block_tokens, Sha256Path::kPortable) ==
            SecondKey(scheme, block_tokens, Sha256Path::kAuto));
    }
  }
}

void LargestTokensFitTheLargestBlock() {
  const std::vector<int32_t> tokens(kMaxBlockTokens, INT32_MAX);
  for (const ChainScheme scheme : {ChainScheme::kPickle, ChainScheme::kCbor}) {
    uint8_t key[kSha256Bytes];
    uint8_t other[kSha256Bytes];
    BlockChain(scheme, kMaxBlockTokens, kNone).Hash(tokens.data(), 1, nullptr, key);
    BlockChain(scheme, kMaxBlockTokens, kNone, Sha256Path::kPortable)
        .Hash(tokens.data(), 1, nullptr, other);
    CHECK(std::memcmp(key, other, sizeof key) == 0);
  }
}

void CursorInRandomStepsIsTheWholeChain() {
  Random random;
  for (const size_t block_tokens : {1, 3, 16, 100}) {
    const size_t n = 5000;
    const auto tokens = Tokens(n, block_tokens);
    const BlockChain chain(ChainScheme::kPickle, block_tokens, kNone);
    const size_t n_blocks = n / block_tokens;
    std::vector<uint8_t> whole(n_blocks * kSha256Bytes);
    chain.Hash(tokens.get(), n_blocks, nullptr, whole.data());

    TokenCursor cursor(chain);
    std::vector<std::pair<std::shared_ptr<const uint8_t[]>, size_t>> held;
    for (size_t at = 0; at < n;) {
      const size_t step = std::min(n - at, random.Below(400));
      const auto delta = Exact(tokens.get() + at, step);
      cursor.Extend(delta.get(), step);
      at += step;
      CHECK(cursor.n_tokens() == at);
      CHECK(cursor.n_blocks() == at / block_tokens);
      held.emplace_back(cursor.keys(), cursor.n_blocks());
    }
    for (const auto& [keys, blocks] : held) {
      CHECK(std::memcmp(keys.get(), whole.data(), blocks * kSha256Bytes) == 0);
    }
    CHECK(cursor.Mismatch(0, tokens.get(), n) == n);
    tokens[n - 1] ^= 1;
    CHECK(cursor.Mismatch(0, tokens.get(), n) == n - 1);
    CHECK(cursor.Mismatch(n - 1, tokens.get() + n - 1, 1) == 0);
  }
}

ExtraKeys Adapter(uint64_t name, uint64_t path) {
  using Kind = ExtraNode::Kind;
  return {{.kind = Kind::kTuple, .number = 1, .identity = 1},
          {.kind = Kind::kTuple, .number = 3, .identity = 2},
          {.kind = Kind::kText, .identity = 3, .bytes = "lora"},
          {.kind = Kind::kText, .identity = name, .bytes = std::string(70000, 'n')},
          {.kind = Kind::kText, .identity = path, .bytes = std::string(70000, 'n')}};
}

void OneObjectAndTwoEqualOnesDifferInPickleOnly() {
  const int32_t token = 7;
  for (const ChainScheme scheme : {ChainScheme::kPickle, ChainScheme::kCbor}) {
    const BlockChain chain(scheme, 1, kNone);
    uint8_t one[kSha256Bytes];
    uint8_t two[kSha256Bytes];
    chain.HashWith(Adapter(4, 4), &token, nullptr, one);
    chain.HashWith(Adapter(4, 5), &token, nullptr, two);
    CHECK((std::memcmp(one, two, sizeof one) == 0) == (scheme == ChainScheme::kCbor));
  }
}

void CursorGivesEachBlockItsExtraKeys() {
  const auto tokens = Tokens(50, 4);
  const BlockChain chain(ChainScheme::kPickle, 4, kNone);
  for (const bool has_first : {false, true}) {
    for (const bool has_rest : {false, true}) {
      std::optional<ExtraKeys> first;
      std::optional<ExtraKeys> rest;
      if (has_first) first = Adapter(4, 5);
      if (has_rest) rest = Adapter(4, 4);
      uint8_t keys[12 * kSha256Bytes];
      for (size_t i = 0; i < 12; ++i) {
        const std::optional<ExtraKeys>& extra = i == 0 ? first : rest;
        uint8_t* const key = keys + i * kSha256Bytes;
        const uint8_t* const parent = i == 0 ? nullptr : key - kSha256Bytes;
        const int32_t* const block = tokens.get() + 4 * i;
        extra ? chain.HashWith(*extra, block, parent, key) : chain.Hash(block, 1, parent, key);
      }
      TokenCursor cursor(chain, first, rest);
      for (size_t at = 0; at < 50; at += 10) cursor.Extend(tokens.get() + at, 10);
      CHECK(std::memcmp(cursor.keys().get(), keys, sizeof keys) == 0);
    }
  }
}

std::vector<uint8_t> Bytes(size_t n) {
  Random random;
  std::vector<uint8_t> bytes(n);
  for (uint8_t& byte : bytes) byte = random.Byte();
  return bytes;
}

void Xxh3IsThatOfXxhashAtEveryLength() {
  const std::vector<uint8_t> bytes = Bytes(4096);
  for (const Xxh3Path path :
       {Xxh3Path::kAuto, Xxh3Path::kAvx512, Xxh3Path::kAvx2, Xxh3Path::kScalar}) {
    if (!HasXxh3Path(path)) continue;
    uint64_t folded = 0;
    for (size_t n = 0; n <= bytes.size(); ++n) {
      const auto exact = Exact(bytes.data(), n);
      folded = folded * 0x9E3779B97F4A7C15 + Xxh3_64(exact.get(), n, path);
    }
    CHECK(folded == 0xd9f94e574f82341e);
  }
}

void StreamInRandomStepsIsTheWholeHash() {
  Random random;
  const std::vector<uint8_t> bytes = Bytes(20000);
  for (size_t n = 0; n <= bytes.size(); n += 1 + random.Below(n < 2200 ? 3 : 500)) {
    Xxh3Stream stream(n);
    const size_t longest = 1 + random.Below(5000);
    for (size_t at = 0; at < n;) {
      const size_t step = std::min(n - at, random.Below(longest + 1));
      const auto exact = Exact(bytes.data() + at, step);
      stream.Update(exact.get(), step);
      at += step;
    }
    CHECK(stream.Digest() == Xxh3_64(bytes.data(), n, Xxh3Path::kScalar));
  }
}

void BlocksAddedByAKernelCountAsIfTheyWentThroughTheStream() {
  const std::vector<uint8_t> bytes = Bytes(9 * kXxh3Block);
  Xxh3Stream first(bytes.size());
  first.Update(bytes.data(), 8 * kXxh3Block);
  Xxh3Stream second(bytes.size());
  std::memcpy(second.accumulators(), first.accumulators(), 8 * sizeof(uint64_t));
  second.SkipBlocks(8);
  second.Update(bytes.data() + 8 * kXxh3Block, kXxh3Block);
  CHECK(second.Digest() == Xxh3_64(bytes.data(), bytes.size()));
}

void OneBrokenByteIsNoticed() {
  std::vector<uint8_t> bytes = Bytes(2100);
  const uint64_t whole = Xxh3_64(bytes.data(), bytes.size());
  for (uint8_t& byte : bytes) {
    byte ^= 0x10;
    CHECK(Xxh3_64(bytes.data(), bytes.size()) != whole);
    byte ^= 0x10;
  }
}

}  // namespace
}  // namespace kvmem

int main() {
  kvmem::Sha256OfAbc();
  kvmem::KeysAreThoseOfPythonsLibraries();
  kvmem::PathsAgreeAtEveryBlockSize();
  kvmem::LargestTokensFitTheLargestBlock();
  kvmem::CursorInRandomStepsIsTheWholeChain();
  kvmem::OneObjectAndTwoEqualOnesDifferInPickleOnly();
  kvmem::CursorGivesEachBlockItsExtraKeys();
  kvmem::Xxh3IsThatOfXxhashAtEveryLength();
  kvmem::StreamInRandomStepsIsTheWholeHash();
  kvmem::BlocksAddedByAKernelCountAsIfTheyWentThroughTheStream();
  kvmem::OneBrokenByteIsNoticed();
}
