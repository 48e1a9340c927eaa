// The arena's shared bytes: header page, slot descriptors, stats, switch, data (docs/formats.md).
//
// A slot is `ranks` shares, each with a descriptor of its own: a table is one rank's view of all
// slots, and its Data and Descriptor are that rank's alone.
//
// Thread safety: the header is immutable once the file has a name. A descriptor is written by the
// one worker that claimed its (slot, generation) and read by anyone at any time, in this process
// or another; every word of it that is shared is atomic.
//
// Invariants
//   A1  A slot's generation only rises, and one Claim() at most succeeds per (slot, generation).
//   A2  The stamp (g, kComplete) stands only while the slot holds generation g's identity,
//       checksum and bytes, whole. So a reader that sees it before and after its copy has copied
//       those bytes and no others (I1, I4).
//   A3  Numbers are little-endian; a machine of the other order refuses the file.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

namespace kvmem {

static_assert(std::endian::native == std::endian::little, "the arena's numbers are little-endian");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "shared between processes");

inline constexpr char kArenaMagic[8] = {'K', 'V', 'M', 'E', 'M', 'A', 'R', 'N'};
inline constexpr uint32_t kArenaVersion = 2;
inline constexpr uint32_t kArenaByteOrder = 0x01020304;
inline constexpr size_t kArenaHeaderBytes = 4096;
inline constexpr size_t kArenaSwitchBytes = 4096;  // after the stats; only Python looks into it
inline constexpr size_t kArenaAlign = size_t{2} << 20;  // of the data
inline constexpr size_t kSlotAlign = 64;
inline constexpr size_t kKeyBytes = 32;
inline constexpr uint64_t kMaxGeneration = (uint64_t{1} << 62) - 1;
inline constexpr uint32_t kMaxRanks = 1024;

struct ArenaHeader {
  char magic[8];
  uint32_t version;
  uint32_t byte_order;
  uint64_t total_bytes;
  uint64_t n_slots;
  uint64_t slot_bytes;   // bytes of one rank's share of a block, of the group with the largest
  uint64_t slot_stride;  // bytes from a share to the next: slot_bytes up to a multiple of 64
  uint64_t descriptors_offset;
  uint64_t stats_offset;
  uint64_t stats_bytes;
  uint64_t data_offset;
  uint32_t ranks;  // shares of a block, side by side
  uint32_t uid;
  uint64_t owner_pid;
  uint64_t owner_start;  // clock ticks after boot, /proc/PID/stat field 22
  unsigned char name_space[kKeyBytes];
  char creator[32];  // kvmem's version, UTF-8, padded with zeros
  char label[128];   // for people, UTF-8, padded with zeros
  unsigned char reserved[kArenaHeaderBytes - 304];
  uint64_t checksum;  // XXH3-64 of all before it
};
static_assert(sizeof(ArenaHeader) == kArenaHeaderBytes);
static_assert(offsetof(ArenaHeader, name_space) == 104);
static_assert(offsetof(ArenaHeader, checksum) == kArenaHeaderBytes - 8);

enum class SlotState : uint64_t { kEmpty = 0, kWriting = 1, kComplete = 2 };

struct alignas(128) SlotDescriptor {
  std::atomic<uint64_t> stamp;  // generation * 4 + SlotState, one word so that they move together
  std::atomic<uint32_t> group;
  uint32_t zero;
  std::atomic<uint64_t> length;
  std::atomic<uint64_t> checksum;  // XXH3-64 of the share's first `length` bytes, seed 0
  std::atomic<uint64_t> key[4];    // 32 bytes
  std::atomic<uint64_t> name_space[4];
  unsigned char reserved[32];
};
static_assert(sizeof(SlotDescriptor) == 128);

// What a block is, besides the namespace: its KV-cache group, its bytes there, its key.
struct Identity {
  uint32_t group;
  uint64_t length;
  const std::byte* key;  // kKeyBytes
};

// The arena of one mapping as one rank sees it, geometry checked. A plain view: it owns nothing.
class SlotTable {
 public:
  // nullopt and a sentence in *error when `bytes` at `base` are not an arena that this version
  // can use, or have no such rank. REQUIRES: base is page-aligned and stays mapped as long as the
  // table is used.
  static std::optional<SlotTable> Open(std::byte* base, size_t bytes, uint32_t rank,
                                       std::string* error);

  uint64_t n_slots() const { return n_slots_; }
  uint64_t slot_bytes() const { return slot_bytes_; }

  // REQUIRES: slot < n_slots().
  std::byte* Data(uint64_t slot) const { return data_ + slot * ranks_ * slot_stride_; }
  SlotDescriptor& Descriptor(uint64_t slot) const { return descriptors_[slot * ranks_]; }

  // Makes (slot, generation) this caller's to write; the state becomes kWriting. False when the
  // slot has that generation already or a later one, or when it is no generation (0 or above
  // kMaxGeneration). The caller orders its bytes after this (A2).
  bool Claim(uint64_t slot, uint64_t generation) const;

  // Writes the identity and the checksum, then kComplete. False when the slot has moved on.
  // REQUIRES: Claim() succeeded; the bytes are visible to any reader of this descriptor.
  bool Complete(uint64_t slot, uint64_t generation, const Identity& identity,
                uint64_t checksum) const;

  bool IsComplete(uint64_t slot, uint64_t generation) const;
  uint64_t Generation(uint64_t slot) const;

  // Whether the slot itself says that it holds this block in this arena's namespace (I1).
  bool HasIdentity(uint64_t slot, const Identity& identity) const;

 private:
  SlotTable() = default;

  SlotDescriptor* descriptors_ = nullptr;  // this rank's first; the next is ranks_ further
  std::byte* data_ = nullptr;              // the same
  uint64_t n_slots_ = 0;
  uint64_t slot_bytes_ = 0;
  uint64_t slot_stride_ = 0;
  uint64_t ranks_ = 1;
  uint64_t name_space_[4] = {};
};

}  // namespace kvmem
