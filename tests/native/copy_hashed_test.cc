// One pass copies every byte, touches none beside them, and gives the digest of what it wrote.
#include "copy/copy_hashed.h"

#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

void TestSizesAndAlignments() {
  std::mt19937_64 random(1);
  std::vector<uint64_t> sizes = {0, 1, 63, 240, 241, 1023, 1024, 1025, 2048, 4096, 16384, 16385};
  for (int i = 0; i < 40; ++i) sizes.push_back(random() % (1 << 20));
  for (int i = 0; i < 20; ++i) sizes.push_back(1024 * (1 + random() % 2048));
  for (const CpuPath path : {CpuPath::kPlain, CpuPath::kAvx2, CpuPath::kAvx512}) {
    if (path > DetectCpu()) continue;
    for (const uint64_t n : sizes) {
      const size_t shift = random() % 3 == 0 ? random() % 64 : 0;
      const size_t from = random() % 2 == 0 ? 128 : random() % 64;
      std::vector<std::byte> source(n + 256);
      for (auto& byte : source) byte = static_cast<std::byte>(random());
      std::vector<std::byte> room(n + 256, std::byte{0xa5});
      std::byte* const base = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64);
      std::byte* const to = base + shift;
      const uint64_t digest = CopyHashed(KernelsFor(path), to, source.data() + from, n);
      KernelsFor(path).fence();
      CHECK(digest == Xxh3_64(source.data() + from, n));
      CHECK(std::memcmp(to, source.data() + from, n) == 0);
      for (const std::byte* at = room.data(); at < to; ++at) CHECK(*at == std::byte{0xa5});
      for (size_t at = static_cast<size_t>(to - room.data()) + n; at < room.size(); ++at) {
        CHECK(room[at] == std::byte{0xa5});
      }
    }
  }
}

}  // namespace
}  // namespace kvmem

int main() { kvmem::TestSizesAndAlignments(); }
