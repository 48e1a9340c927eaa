// The bytes that vLLM hashes for a block: the triple (parent key, tuple of token ids, extra keys)
// as `pickle.dumps(..., protocol=5)` and as `cbor2.dumps(..., canonical=True)` write it
// (vllm/utils/hashing.py). chain.cc writes the usual block, which has no extra keys; these two
// write the others.
//
// Pickle depends on object identity, not on values alone: an object met a second time within one
// call is written as a reference to the first. ExtraNode::identity says which are one object.
//
// Thread safety: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kvmem {

// One value of a block's extra keys.
struct ExtraNode {
  enum class Kind : uint8_t { kNone, kFalse, kTrue, kInt, kText, kBytes, kTuple };

  Kind kind = Kind::kNone;
  int64_t number = 0;      // kInt: the value; kTuple: how many values it holds, which follow
  uint64_t identity = 0;   // kText, kBytes, kTuple: equal for one object; 0 for an object met once
  std::string bytes = {};  // kText: UTF-8; kBytes
};

// A tuple of values in pre-order: the node of the tuple, then its values, each followed by its own.
using ExtraKeys = std::vector<ExtraNode>;

// A block's three parts.
struct BlockView {
  const uint8_t* parent;  // 32 bytes
  const int32_t* tokens;  // each >= 0
  size_t n_tokens;
  const ExtraKeys& extra;
};

// Replace `out` by the encoding.
void EncodePickle(const BlockView& block, std::vector<uint8_t>* out);
void EncodeCbor(const BlockView& block, std::vector<uint8_t>* out);

}  // namespace kvmem
