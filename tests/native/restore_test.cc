// The index of an earlier run: what is restored is prefix-closed, and generations go on.
#include <cstring>
#include <vector>

#include "check.h"
#include "pool/host_tier.h"

namespace kvmem {
namespace {

void KeyOf(uint64_t i, unsigned char* key) {
  std::memset(key, 0, kKeyBytes);
  const uint64_t words[2] = {i + 1, i * 0x9e3779b97f4a7c15u};
  std::memcpy(key, words, sizeof words);
}

struct Earlier {
  std::vector<int32_t> slots;
  std::vector<uint64_t> generations, checksums;
  std::vector<unsigned char> keys, parents;

  void Add(int32_t slot, uint64_t generation, uint64_t key, int64_t parent) {
    slots.push_back(slot);
    generations.push_back(generation);
    checksums.push_back(key * 3);
    keys.resize(keys.size() + kKeyBytes);
    parents.resize(parents.size() + kKeyBytes);
    KeyOf(key, keys.data() + keys.size() - kKeyBytes);
    if (parent >= 0) {
      KeyOf(static_cast<uint64_t>(parent), parents.data() + parents.size() - kKeyBytes);
    }
  }
  HostTier::Recovered View() const {
    HostTier::Recovered view;
    view.n = slots.size();
    view.slots = slots.data();
    view.generations = generations.data();
    view.checksums = checksums.data();
    view.keys = keys.data();
    view.parents = parents.data();
    return view;
  }
};

std::vector<unsigned char> Chain(uint64_t first, uint64_t n) {
  std::vector<unsigned char> keys(n * kKeyBytes);
  for (uint64_t i = 0; i < n; ++i) KeyOf(first + i, keys.data() + i * kKeyBytes);
  return keys;
}

void TestAnIndexIsRestoredWithItsClosure() {
  for (const char* order : {"lru", "s3fifo"}) {
    Earlier earlier;
    earlier.Add(5, 9, 2, 1);  // children before their parents
    earlier.Add(3, 4, 1, 0);
    earlier.Add(0, 1, 0, -1);
    earlier.Add(7, 1, 11, 10);   // 10 is gone
    earlier.Add(8, 1, 12, 11);   // and so is its child
    earlier.Add(9, 1, 0, -1);    // a second block of that key
    earlier.Add(40, 1, 20, -1);  // no such slot
    earlier.Add(0, 8, 21, -1);   // another's slot
    earlier.Add(10, 0, 22, -1);  // no generation
    earlier.Add(11, 1, 31, 32);  // a ring
    earlier.Add(12, 1, 32, 31);
    const auto tier = HostTier::Create(16, order);
    const std::vector<size_t> gone = tier->Restore(earlier.View());
    CHECK((gone == std::vector<size_t>{3, 4, 5, 6, 7, 8, 9, 10}));
    CHECK(tier->CheckIntegrity().empty());
    const auto keys = Chain(0, 3);
    const HostTier::Acquired got = tier->Acquire(PackedKeys(keys.data(), 3), 0, 3);
    CHECK((got.slots == std::vector<int32_t>{0, 3, 5}));
    CHECK((got.generations == std::vector<uint64_t>{1, 4, 9}));
    CHECK(tier->Checksum(5, 9) == 6);
    CHECK(tier->Release(got.lease));
    // Twenty new ones: the old leave, leaves first, and their slots go on from their generations.
    const auto more = Chain(100, 16);
    const HostTier::Reserved room = tier->Reserve(PackedKeys(more.data(), 16), 0, 16);
    CHECK(room.result == ReserveResult::kOk && room.slots.size() == 16);
    for (size_t i = 0; i < 16; ++i) {
      const uint64_t before = room.slots[i] == 5 ? 9 : room.slots[i] == 3 ? 4 : 0;
      CHECK(room.generations[i] > before);
    }
    CHECK(tier->CheckIntegrity().empty());
  }
}

}  // namespace
}  // namespace kvmem

int main() {
  kvmem::TestAnIndexIsRestoredWithItsClosure();
  return 0;
}
