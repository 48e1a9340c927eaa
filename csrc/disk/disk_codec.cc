#include "disk/disk_codec.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "disk/int8.h"

namespace kvmem {
namespace {

constexpr int kLevel = 1;  // higher ones take longer and save no more of such bytes

// The part of libzstd's stable API that is used (zstd.h 1.4 and later).
struct Zstd {
  void* (*create_cctx)();
  size_t (*free_cctx)(void*);
  size_t (*compress)(void*, void*, size_t, const void*, size_t, int);
  void* (*create_dctx)();
  size_t (*free_dctx)(void*);
  size_t (*decompress)(void*, void*, size_t, const void*, size_t);
  unsigned (*is_error)(size_t);
};

template <typename F>
bool Look(void* library, const char* name, F* found) {
  *found = reinterpret_cast<F>(dlsym(library, name));
  return *found != nullptr;
}

// nullptr where the machine has none. It stays loaded.
const Zstd* TheZstd() {
  static const Zstd* const zstd = []() -> const Zstd* {
    void* const library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    static Zstd found;
    if (library == nullptr || !Look(library, "ZSTD_createCCtx", &found.create_cctx) ||
        !Look(library, "ZSTD_freeCCtx", &found.free_cctx) ||
        !Look(library, "ZSTD_compressCCtx", &found.compress) ||
        !Look(library, "ZSTD_createDCtx", &found.create_dctx) ||
        !Look(library, "ZSTD_freeDCtx", &found.free_dctx) ||
        !Look(library, "ZSTD_decompressDCtx", &found.decompress) ||
        !Look(library, "ZSTD_isError", &found.is_error)) {
      return nullptr;
    }
    return &found;
  }();
  return zstd;
}

void Split2(const std::byte* from, size_t n, std::byte* high, std::byte* low) {
  for (size_t i = 0; i < n; ++i) {
    low[i] = from[2 * i];
    high[i] = from[2 * i + 1];
  }
}

void Join2(const std::byte* high, const std::byte* low, size_t n, std::byte* to) {
  for (size_t i = 0; i < n; ++i) {
    to[2 * i] = low[i];
    to[2 * i + 1] = high[i];
  }
}

void Split4(const std::byte* from, size_t n, std::byte* high, std::byte* low) {
  for (size_t i = 0; i < n; ++i) {
    std::memcpy(low + 3 * i, from + 4 * i, 3);
    high[i] = from[4 * i + 3];
  }
}

void Join4(const std::byte* high, const std::byte* low, size_t n, std::byte* to) {
  for (size_t i = 0; i < n; ++i) {
    std::memcpy(to + 4 * i, low + 3 * i, 3);
    to[4 * i + 3] = high[i];
  }
}

}  // namespace

struct DiskCodec::Contexts {
  const Zstd* zstd = TheZstd();
  void* in = zstd != nullptr ? zstd->create_cctx() : nullptr;
  void* out = zstd != nullptr ? zstd->create_dctx() : nullptr;
  std::vector<std::byte> high;
  std::vector<std::byte> low;

  bool ready() const { return in != nullptr && out != nullptr; }
  ~Contexts() {
    if (in != nullptr) zstd->free_cctx(in);
    if (out != nullptr) zstd->free_dctx(out);
  }
};

DiskCodec::DiskCodec() : contexts_(std::make_unique<Contexts>()) {}
DiskCodec::~DiskCodec() = default;

bool DiskCodec::Available() { return TheZstd() != nullptr; }

size_t DiskCodec::Encode(uint32_t codec, const std::byte* from, size_t n, std::byte* to,
                         size_t room) {
  if (IsApproximate(codec)) return EncodeInt8(codec, from, n, to, room);
  Contexts& c = *contexts_;
  if (!c.ready() || n == 0 || n % codec != 0) return 0;
  const size_t n_elements = n / codec;
  const size_t n_low = n - n_elements;
  uint32_t n_frame = 0;
  if (room <= sizeof n_frame + n_low) return 0;
  c.high.resize(n_elements);
  c.low.resize(n_low);
  (codec == 2 ? Split2 : Split4)(from, n_elements, c.high.data(), c.low.data());
  const size_t done = c.zstd->compress(c.in, to + sizeof n_frame, room - sizeof n_frame - n_low,
                                       c.high.data(), n_elements, kLevel);
  if (c.zstd->is_error(done) != 0) return 0;  // it would be longer than there is room
  n_frame = static_cast<uint32_t>(done);
  std::memcpy(to, &n_frame, sizeof n_frame);
  std::memcpy(to + sizeof n_frame + n_frame, c.low.data(), n_low);
  return sizeof n_frame + n_frame + n_low;
}

bool DiskCodec::Decode(uint32_t codec, const std::byte* from, size_t n_stored, std::byte* to,
                       size_t n) {
  if (IsApproximate(codec)) return DecodeInt8(codec, from, n_stored, to, n);
  Contexts& c = *contexts_;
  uint32_t n_frame = 0;
  if (!c.ready() || (codec != 2 && codec != 4) || n % codec != 0 || n_stored < sizeof n_frame) {
    return false;
  }
  const size_t n_elements = n / codec;
  const size_t n_low = n - n_elements;
  std::memcpy(&n_frame, from, sizeof n_frame);
  if (n_stored != sizeof n_frame + uint64_t{n_frame} + n_low) return false;
  c.high.resize(n_elements);
  const std::byte* const frame = from + sizeof n_frame;
  if (c.zstd->decompress(c.out, c.high.data(), n_elements, frame, n_frame) != n_elements) {
    return false;  // an error is a number larger than any length
  }
  (codec == 2 ? Join2 : Join4)(c.high.data(), frame + n_frame, n_elements, to);
  return true;
}

uint32_t CodecChoice::Of(uint32_t group) {
  const std::lock_guard lock(mutex_);
  Group& g = groups_[group];
  if (g.n < kSamples) return kMeasure;
  if (++g.since == kAgain) g = Group{};
  return g.codec;
}

void CodecChoice::Saw(uint32_t group, uint64_t units_raw, uint64_t units_2, uint64_t units_4) {
  const std::lock_guard lock(mutex_);
  Group& g = groups_[group];
  g.raw += units_raw;
  g.two += units_2;
  g.four += units_4;
  if (++g.n < kSamples) return;
  const uint64_t least = std::min(g.two, g.four);
  g.codec = 16 * (g.raw - std::min(g.raw, least)) < g.raw ? 0 : g.two <= g.four ? 2 : 4;
}

}  // namespace kvmem
