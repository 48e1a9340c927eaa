// A block's identity and lists of them. Plain values: as thread-safe as the memory they point to.
//
// Identity is all 32 bytes. Mix() is for tables only and never decides whether two keys are equal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvmem {

inline constexpr size_t kKeyBytes = 32;

struct Key {
  uint64_t word[4];

  friend bool operator==(const Key&, const Key&) = default;
};

inline Key LoadKey(const void* bytes) {
  Key key;
  std::memcpy(key.word, bytes, kKeyBytes);
  return key;
}

// 64 well-mixed bits of a key (the finaliser is MurmurHash3's fmix64).
inline uint64_t Mix(const Key& key) {
  uint64_t h = key.word[0];
  for (int i = 1; i < 4; ++i) {
    h = (h ^ (h >> 32)) * 0x9e3779b97f4a7c15u + key.word[i];
  }
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdu;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53u;
  return h ^ (h >> 33);
}

// The keys of one prompt: At(i) is the chained key of block i, so it names blocks 0..i together.
// Only the keys that an operation looks at are asked for.
class KeyList {
 public:
  virtual ~KeyList() = default;

  // REQUIRES: i < size().
  virtual Key At(size_t i) const = 0;
  size_t size() const { return size_; }

 protected:
  explicit KeyList(size_t size) : size_(size) {}

 private:
  const size_t size_;
};

// n * 32 bytes that the caller keeps alive.
class PackedKeys final : public KeyList {
 public:
  PackedKeys(const void* bytes, size_t n)
      : KeyList(n), bytes_(static_cast<const unsigned char*>(bytes)) {}
  Key At(size_t i) const override { return LoadKey(bytes_ + i * kKeyBytes); }

 private:
  const unsigned char* const bytes_;
};

}  // namespace kvmem
