// kvmem._core's BlockHasher and xxh3_64.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "bind/extra_keys.h"
#include "bind/py_bytes.h"
#include "bind/tokens.h"
#include "hash/chain.h"
#include "hash/xxh3.h"

namespace kvmem::bind {
namespace nb = nanobind;
namespace {

// Below this a call is too short to be worth waiting for the GIL afterwards (0.5 ms of hashing).
constexpr size_t kReleaseTokens = 65536;
constexpr size_t kReleaseBytes = 65536;

[[noreturn]] void RaiseValue(const std::string& message) { throw nb::value_error(message.c_str()); }

const uint8_t* KeyBytes(const char* name, const nb::bytes& key) {
  if (key.size() != kSha256Bytes) {
    RaiseValue(std::string(name) + " must have 32 bytes, not " + std::to_string(key.size()));
  }
  return reinterpret_cast<const uint8_t*>(key.c_str());
}

[[noreturn]] void RaiseCpuPath(const std::string& name) {
  RaiseValue("cpu_path '" + name + "' is unknown, or this CPU lacks it; use 'auto'");
}

BlockChain MakeChain(const std::string& algorithm, int64_t block_tokens, nb::bytes none_hash,
                     const std::string& cpu_path) {
  const std::optional<Sha256Path> path = ParseSha256Path(cpu_path);
  if (!path || SelectSha256(*path) == nullptr) RaiseCpuPath(cpu_path);
  const std::optional<ChainScheme> scheme = ParseChainScheme(algorithm);
  if (!scheme) RaiseValue("algorithm must be sha256 or sha256_cbor, not '" + algorithm + "'");
  if (block_tokens < 1 || block_tokens > static_cast<int64_t>(kMaxBlockTokens)) {
    RaiseValue("block_tokens must be within 1.." + std::to_string(kMaxBlockTokens) + ", not " +
               std::to_string(block_tokens));
  }
  return {*scheme, static_cast<size_t>(block_tokens), KeyBytes("none_hash", none_hash), *path};
}

const uint8_t* ParentBytes(const std::optional<nb::bytes>& parent) {
  return parent ? KeyBytes("parent", *parent) : nullptr;
}

// All at once, without the GIL: from a copy, since threads that have it may write to the array.
void HashLong(const BlockChain& chain, const Tokens& tokens, const uint8_t* parent, size_t n_blocks,
              uint8_t* keys) {
  std::vector<int32_t> scratch;
  const int32_t* const ids = tokens.Copy(0, n_blocks * chain.block_tokens(), scratch);
  const nb::gil_scoped_release release;
  chain.Hash(ids, n_blocks, parent, keys);
}

// Some blocks at a time, with the GIL, so that a list's ids are hashed while they are in the first
// cache: take(i, key) gets the key of block i.
template <typename Take>
void HashShort(const BlockChain& chain, const Tokens& tokens, const uint8_t* parent,
               size_t n_blocks, const Take& take) {
  constexpr size_t kAtOnce = 32;
  const size_t n = chain.block_tokens();
  std::vector<int32_t> scratch;
  uint8_t keys[(1 + kAtOnce) * kSha256Bytes];  // the parent's first
  uint8_t* const own = keys + kSha256Bytes;
  for (size_t from = 0; from < n_blocks; from += kAtOnce) {
    const size_t now = std::min(kAtOnce, n_blocks - from);
    chain.Hash(tokens.Read(from * n, now * n, scratch), now, parent, own);
    for (size_t i = 0; i < now; ++i) take(from + i, own + i * kSha256Bytes);
    std::memcpy(keys, own + (now - 1) * kSha256Bytes, kSha256Bytes);
    parent = keys;
  }
}

using ExtraList = std::vector<std::optional<ExtraKeys>>;

ExtraList ParseExtraList(nb::handle extra_keys, ChainScheme scheme) {
  const nb::object list = nb::steal(PySequence_List(extra_keys.ptr()));
  if (!list.is_valid()) throw nb::python_error();
  const auto n_entries = static_cast<size_t>(PyList_Size(list.ptr()));
  ExtraList extra;
  extra.reserve(n_entries);
  for (size_t i = 0; i < n_entries; ++i) {
    const std::string where = "extra_keys[" + std::to_string(i) + "]";
    extra.push_back(ParseExtraKeys(PyList_GetItem(list.ptr(), static_cast<Py_ssize_t>(i)),
                                   where.c_str(), scheme));
  }
  return extra;
}

// Blocks of which some have extra keys, without the GIL.
std::vector<uint8_t> HashExtra(const BlockChain& chain, nb::handle source, const uint8_t* parent,
                               nb::handle extra_keys) {
  // First: it runs any Python the caller likes (a generator), which may change the tokens too.
  const ExtraList extra = ParseExtraList(extra_keys, chain.scheme());
  const Tokens tokens(source);
  const size_t n_blocks = tokens.size() / chain.block_tokens();
  if (extra.size() != n_blocks) {
    RaiseValue("extra_keys must have one entry per block: " + std::to_string(n_blocks) + ", not " +
               std::to_string(extra.size()));
  }
  std::vector<int32_t> scratch;
  const int32_t* const ids = tokens.Copy(0, n_blocks * chain.block_tokens(), scratch);
  std::vector<uint8_t> keys(n_blocks * kSha256Bytes);
  const nb::gil_scoped_release release;
  for (size_t i = 0; i < n_blocks; ++i) {
    uint8_t* const key = keys.data() + i * kSha256Bytes;
    const int32_t* const block = ids + i * chain.block_tokens();
    extra[i] ? chain.HashWith(*extra[i], block, parent, key) : chain.Hash(block, 1, parent, key);
    parent = key;
  }
  return keys;
}

nb::object HashPacked(const BlockChain& chain, nb::handle source, std::optional<nb::bytes> parent,
                      nb::handle extra_keys) {
  const uint8_t* const before = ParentBytes(parent);
  if (!extra_keys.is_none()) {
    const auto keys = HashExtra(chain, source, before, extra_keys);
    return NewBytes(keys.data(), keys.size());
  }
  const Tokens tokens(source);
  const size_t n_blocks = tokens.size() / chain.block_tokens();
  nb::object packed = NewBytes(nullptr, n_blocks * kSha256Bytes);
  uint8_t* const keys = BytesOf(packed);
  if (tokens.size() >= kReleaseTokens) {
    HashLong(chain, tokens, before, n_blocks, keys);
  } else {
    HashShort(chain, tokens, before, n_blocks, [&](size_t i, const uint8_t* key) {
      std::memcpy(keys + i * kSha256Bytes, key, kSha256Bytes);
    });
  }
  return packed;
}

nb::object HashBlocks(const BlockChain& chain, nb::handle source, std::optional<nb::bytes> parent,
                      nb::handle extra_keys) {
  const uint8_t* const before = ParentBytes(parent);
  if (!extra_keys.is_none()) {
    const auto keys = HashExtra(chain, source, before, extra_keys);
    return KeyList(keys.data(), keys.size() / kSha256Bytes);
  }
  const Tokens tokens(source);
  const size_t n_blocks = tokens.size() / chain.block_tokens();
  if (tokens.size() >= kReleaseTokens) {
    const auto keys = std::make_unique_for_overwrite<uint8_t[]>(n_blocks * kSha256Bytes);
    HashLong(chain, tokens, before, n_blocks, keys.get());
    return KeyList(keys.get(), n_blocks);
  }
  nb::object list = NewList(n_blocks);
  HashShort(chain, tokens, before, n_blocks, [&](size_t i, const uint8_t* key) {
    nb::object bytes = NewBytes(key, kSha256Bytes);
    PyList_SetItem(list.ptr(), static_cast<Py_ssize_t>(i), bytes.release().ptr());  // steals
  });
  return list;
}

uint64_t Xxh3OfBuffer(nb::handle source, const std::string& cpu_path) {
  const std::optional<Xxh3Path> path = ParseXxh3Path(cpu_path);
  if (!path || !HasXxh3Path(*path)) RaiseCpuPath(cpu_path);
  using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
  Array array;
  const void* data = nullptr;
  size_t n_bytes = 0;
  if (PyBytes_Check(source.ptr())) {
    data = PyBytes_AsString(source.ptr());
    n_bytes = static_cast<size_t>(PyBytes_Size(source.ptr()));
  } else if (nb::try_cast(source, array, false)) {
    data = array.data();
    n_bytes = array.nbytes();
  } else {
    throw nb::type_error("buffer must be bytes or a contiguous buffer");
  }
  if (n_bytes < kReleaseBytes) return Xxh3_64(data, n_bytes, *path);
  const nb::gil_scoped_release release;
  return Xxh3_64(data, n_bytes, *path);
}

nb::object PackTokens(nb::handle source, int64_t start) {
  const Tokens tokens(source);
  if (start < 0 || static_cast<uint64_t>(start) > tokens.size()) {
    RaiseValue("start must be within 0.." + std::to_string(tokens.size()) + ", not " +
               std::to_string(start));
  }
  const size_t n = tokens.size() - static_cast<size_t>(start);
  std::vector<int32_t> scratch;
  const int32_t* const ids = tokens.Read(static_cast<size_t>(start), n, scratch);
  return NewBytes(reinterpret_cast<const uint8_t*>(ids), n * sizeof(int32_t));
}

}  // namespace

#define BLOCKS                                                                           \
  "tokens: list[int] | numpy.typing.NDArray[numpy.int32], parent: bytes | None = None, " \
  "extra_keys: collections.abc.Sequence[tuple[object, ...] | None] | None = None"

void RegisterHash(nb::module_& m) {
  using nb::arg;
  FindListReader();
  InitExtraKeys();
  m.def("list_reader", &ListReader, arg("name") = "",
        "How lists of tokens are read: 'in place' or 'abi3'. A name switches first; for tests.");
  m.def(
      "xxh3_64", &Xxh3OfBuffer, arg("buffer"), nb::kw_only(), arg("cpu_path") = "auto",
      nb::sig("def xxh3_64(buffer: typing_extensions.Buffer, *, cpu_path: str = \"auto\") -> int"),
      "XXH3-64, seed 0, of the buffer's bytes. Releases the GIL for long buffers.");
  m.def("pack_tokens", &PackTokens, arg("tokens"), arg("start") = 0,
        nb::sig("def pack_tokens(tokens: list[int] | numpy.typing.NDArray[numpy.int32], start: int "
                "= 0) -> bytes"),
        "tokens[start:] as int32, 4 bytes each, in the machine's byte order.\n\n"
        "Raises:\n    TypeError: a token is no int.\n    ValueError: a token is outside "
        "0..2^31-1, or start outside 0..len(tokens).");
  nb::class_<BlockChain>(m, "BlockHasher",
                         "The engine's block keys; kvmem.hashing.BlockHasher takes a seed.\n\n"
                         "Never changes; may be used from any thread.")
      .def(
          "__init__",
          [](BlockChain* self, const std::string& algorithm, int64_t block_tokens,
             nb::bytes none_hash, const std::string& cpu_path) {
            new (self)
                BlockChain(MakeChain(algorithm, block_tokens, std::move(none_hash), cpu_path));
          },
          arg("algorithm"), arg("block_tokens"), arg("none_hash"), nb::kw_only(),
          arg("cpu_path") = "auto",
          "`none_hash` is the 32-byte parent of a first block; `cpu_path` is auto, sha_ni or "
          "plain.\n\nRaises:\n    ValueError: unknown algorithm, block_tokens not in 1..4096, "
          "a cpu_path that this CPU lacks.")
      .def_prop_ro("algorithm", [](const BlockChain& c) { return ChainSchemeName(c.scheme()); })
      .def_prop_ro("block_tokens", &BlockChain::block_tokens)
      .def_prop_ro("none_hash",
                   [](const BlockChain& c) {
                     return nb::bytes(reinterpret_cast<const char*>(c.none_hash()), kSha256Bytes);
                   })
      .def("hash_blocks", &HashBlocks, arg("tokens"), arg("parent") = nb::none(),
           arg("extra_keys") = nb::none(),
           nb::sig("def hash_blocks(self, " BLOCKS ") -> list[bytes]"),
           "The 32-byte keys of the whole blocks of `tokens`; a rest that fills no block has "
           "none.\n\n"
           "`parent` is the key of the block before them, None when they begin the prompt. "
           "`extra_keys` has\none entry per block, as the engine's generate_block_hash_extra_keys "
           "gives it.\n\n"
           "Raises:\n    TypeError: a token is no int (bool included), or an extra key no str, "
           "bytes, int, bool,\n        None or tuple of them.\n"
           "    ValueError: a token is outside 0..2^31-1, `parent` isn't 32 bytes, or "
           "`extra_keys` hasn't\n        one entry per block.")
      .def("hash_packed", &HashPacked, arg("tokens"), arg("parent") = nb::none(),
           arg("extra_keys") = nb::none(), nb::sig("def hash_packed(self, " BLOCKS ") -> bytes"),
           "What hash_blocks answers, joined: n_blocks*32 bytes.");
}

}  // namespace kvmem::bind
