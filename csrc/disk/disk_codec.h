// How a block's bytes are stored: as they are, or shorter, and exact but for the int8 codecs.
//
//   0   as they are
//   2   elements of 2 bytes (bf16, fp16): the high bytes as one zstd frame, the low bytes as they
//       are behind it. Signs and exponents repeat, mantissas do not.
//   4   elements of 4 bytes (float32): likewise the highest byte, and the three below it
//
//   stored := frame_length (u32) frame low_bytes
//
//   8   bf16, 9 fp16, 10 float32, approximate (I10): whole numbers of 8 bits, and a scale for each
//       64 elements: the largest of their magnitudes over 127, as bf16 rounded away from zero
//
//   stored := scales (bf16 each) numbers (int8 each); element = number * scale, rounded
//
// zstd is the machine's own libzstd.so.1, looked up at the first use; without it no
// block is stored by 2 or 4.
//
// Thread safety: DiskCodec none, one a thread; CodecChoice any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace kvmem {

inline bool IsApproximate(uint32_t codec) { return codec >= 8 && codec <= 10; }
inline bool NeedsZstd(uint32_t codec) { return codec == 2 || codec == 4; }
inline bool IsCodec(uint32_t codec) {
  return codec == 0 || NeedsZstd(codec) || IsApproximate(codec);
}

class DiskCodec {
 public:
  DiskCodec();
  ~DiskCodec();
  DiskCodec(const DiskCodec&) = delete;
  DiskCodec& operator=(const DiskCodec&) = delete;

  // Whether libzstd is there.
  static bool Available();

  // Bytes written to `to`; 0 if they would be more than `room`, n is no multiple of the element,
  // zstd is needed and not there, or an approximate codec meets an element that is no finite
  // number. REQUIRES: IsCodec(codec), not 0.
  size_t Encode(uint32_t codec, const std::byte* from, size_t n, std::byte* to, size_t room);

  // Fills to[0, n) from what Encode() wrote; false if it is not that. Never writes beyond n.
  bool Decode(uint32_t codec, const std::byte* from, size_t n_stored, std::byte* to, size_t n);

 private:
  struct Contexts;
  std::unique_ptr<Contexts> contexts_;
};

// Which codec pays, measured for each KV-cache group on its first blocks and again now and then:
// the one that saves most of the disk's units, if it saves a sixteenth.
class CodecChoice {
 public:
  static constexpr int kSamples = 8;
  static constexpr uint64_t kAgain = 4096;  // blocks
  static constexpr uint32_t kMeasure = UINT32_MAX;

  // What a block of this group is to be stored by; kMeasure: by whichever is shortest, and Saw()
  // is to be told.
  uint32_t Of(uint32_t group);
  void Saw(uint32_t group, uint64_t units_raw, uint64_t units_2, uint64_t units_4);

 private:
  struct Group {
    int n = 0;
    uint64_t raw = 0, two = 0, four = 0, since = 0;
    uint32_t codec = 0;
  };
  std::mutex mutex_;
  std::unordered_map<uint32_t, Group> groups_;  // guarded by mutex_
};

}  // namespace kvmem
