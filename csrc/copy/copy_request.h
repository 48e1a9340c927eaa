// What a copier is asked, what it answers, and what every copier does beside the copying: the
// identity of a slot before and after (I1), the order in which a slot is claimed and completed.
//
// Thread safety: the functions keep nothing; the slots' words are atomic (slot_table.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "copy/slot_table.h"

namespace kvmem {

enum class CopyStatus : uint8_t {
  kOk = 0,
  kIdentity = 1,    // the slot holds another block, or is not complete
  kGeneration = 2,  // the slot has moved on, before or during the copy
  kChecksum = 3,    // the bytes are not the ones stored
  kRange = 4,       // no such block or slot
  kDevice = 5,      // the device refused or failed: nothing is known of the bytes
};

// One piece of every block: a layer of the device cache, or one of a layer's states.
struct Layer {
  std::byte* base;
  uint64_t stride;  // bytes from a block to the next
  uint64_t piece;   // bytes of a block in this layer
};

inline constexpr size_t kMaxGroups = 64;

// The blocks of a KV-cache group: `bytes` is 0 until they are registered.
struct BlockLayout {
  std::vector<Layer> layers;
  uint64_t n_blocks = 0;
  uint64_t bytes = 0;  // of a block, all layers
};

// The layout of these layers, or one of 0 bytes and a sentence in *error when the layers are no
// memory or a slot of `slot_bytes` can't hold them.
BlockLayout LayoutOf(std::vector<Layer> layers, uint64_t n_blocks, uint64_t slot_bytes,
                     std::string* error);

// What to copy; every array has n entries, keys 32 * n bytes. Owned by the caller.
struct CopyRequest {
  size_t group;
  size_t n;
  const int32_t* block_ids;
  const int32_t* slots;
  const uint64_t* generations;
  const std::byte* keys;
};

// One block of a request, in one rank's slots.
struct CopyItem {
  const SlotTable& table;
  const CopyRequest& request;
  const BlockLayout& layout;
  size_t i;

  uint64_t slot() const { return static_cast<uint64_t>(request.slots[i]); }
  uint64_t generation() const { return request.generations[i]; }
  uint64_t block() const { return static_cast<uint64_t>(request.block_ids[i]); }
  Identity identity() const {
    return {static_cast<uint32_t>(request.group), layout.bytes, request.keys + i * kKeyBytes};
  }
  bool in_range() const {
    return request.block_ids[i] >= 0 && request.slots[i] >= 0 && block() < layout.n_blocks &&
           slot() < table.n_slots();
  }

  // True when the slot is this caller's to write; else *status and *checksum are the answer: kOk
  // where the slot holds this very block complete already, kGeneration where it has moved on,
  // kRange.
  bool BeginStore(CopyStatus* status, uint64_t* checksum) const;
  // The bytes are in the slot, visible to any reader of its descriptor (A2, I4).
  void EndStore(uint64_t digest, CopyStatus* status, uint64_t* checksum) const;

  // True when the slot says that it holds this block, and *recorded is its checksum; else *status.
  bool BeginLoad(CopyStatus* status, uint64_t* recorded) const;
  // After the copy: whether it is still the same (A2). REQUIRES: the copy's reads are over.
  void EndLoad(CopyStatus* status) const;
};

}  // namespace kvmem
