// Batches of blocks, by one thread and by three: every item gets its own answer and its own bytes,
// whatever stands beside it, and no byte but theirs is touched. Device memory and arena end against
// pages that nobody may touch.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "arena_bytes.h"
#include "check.h"
#include "copy/slot_copier.h"
#include "guarded_bytes.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

using Bytes = std::vector<std::byte>;

constexpr size_t kSlots = 64;  // fill whole pages
constexpr size_t kMostItems = 13;
constexpr size_t kBlocks = 2 * kMostItems;  // [0, 13) are stored from, [13, 26) loaded to

const std::vector<size_t> kBatches = {1, 2, 3, 4, 5, 13};
constexpr int kThreads[] = {1, 3};

void FillRandom(std::byte* bytes, size_t n, uint64_t seed) {
  for (size_t at = 0; at < n; at += sizeof(uint64_t)) {
    uint64_t word = (seed << 32 | at) * 0x9e3779b97f4a7c15u;
    word = (word ^ word >> 31) * 0xbf58476d1ce4e5b9u;
    std::memcpy(bytes + at, &word, std::min(sizeof word, n - at));
  }
}

Bytes KeyOf(int32_t slot) {
  Bytes key(kKeyBytes);
  FillRandom(key.data(), key.size(), static_cast<uint64_t>(slot));
  return key;
}

// Device memory, one mapping a layer; the last block's piece is the last before the guard.
class Device {
 public:
  explicit Device(const std::vector<size_t>& pieces) : pieces_(pieces) {
    for (const size_t piece : pieces) {
      const size_t stride = RoundUp(piece + 1, kSlotAlign);  // a gap after each piece
      strides_.push_back(stride);
      layers_.push_back(std::make_unique<GuardedBytes>((kBlocks - 1) * stride + piece));
      FillRandom(layers_.back()->data(), layers_.back()->size(), piece);
    }
  }
  void Register(SlotCopier& copier) const {
    std::vector<Layer> layers;
    for (size_t k = 0; k < pieces_.size(); ++k) {
      layers.push_back({layers_[k]->data(), strides_[k], pieces_[k]});
    }
    std::string error;
    CHECK(copier.RegisterLayers(0, layers, kBlocks, &error));
  }
  // Overwrites the blocks to load to.
  void Spoil(int with) const {
    for (size_t k = 0; k < pieces_.size(); ++k) {
      const size_t from = kMostItems * strides_[k];
      std::memset(layers_[k]->data() + from, with, layers_[k]->size() - from);
    }
  }
  Bytes Block(size_t block) const {
    Bytes bytes;
    for (size_t k = 0; k < pieces_.size(); ++k) {
      const std::byte* const piece = layers_[k]->data() + block * strides_[k];
      bytes.insert(bytes.end(), piece, piece + pieces_[k]);
    }
    return bytes;
  }
  // All bytes, with those of some blocks left out.
  std::vector<Bytes> AllBut(const std::vector<size_t>& blocks) const {
    std::vector<Bytes> all;
    for (size_t k = 0; k < pieces_.size(); ++k) {
      Bytes& layer = all.emplace_back(layers_[k]->data(), layers_[k]->data() + layers_[k]->size());
      for (const size_t block : blocks) {
        std::memset(layer.data() + block * strides_[k], 0, pieces_[k]);
      }
    }
    return all;
  }

 private:
  const std::vector<size_t> pieces_;
  std::vector<size_t> strides_;
  std::vector<std::unique_ptr<GuardedBytes>> layers_;
};

struct Batch {
  std::vector<int32_t> blocks;
  std::vector<int32_t> slots;
  std::vector<uint64_t> generations;
  Bytes keys;

  void Add(size_t block, int32_t slot, uint64_t generation, const Bytes& key) {
    blocks.push_back(static_cast<int32_t>(block));
    slots.push_back(slot);
    generations.push_back(generation);
    keys.insert(keys.end(), key.begin(), key.end());
  }
  CopyRequest request() const {
    return {0, slots.size(), blocks.data(), slots.data(), generations.data(), keys.data()};
  }
};

struct World {
  World(const std::vector<size_t>& pieces, int threads, CpuPath path)
      : slot_bytes(std::accumulate(pieces.begin(), pieces.end(), size_t{0})),
        arena(kSlots, slot_bytes),
        device(pieces),
        copier(arena.table(), threads, path),
        data(copier.table().Data(0)),
        data_bytes(kSlots * RoundUp(slot_bytes, kSlotAlign)),
        order(kSlots) {
    device.Register(copier);
    // The last slot and the last block come first: those that end at the guards.
    std::iota(order.rbegin(), order.rend(), 0);
  }
  // Nothing that was copied before is where it was.
  void Renew() {
    generation += 2;
    std::memset(data, static_cast<int>(generation), data_bytes);
    device.Spoil(static_cast<int>(generation));
    std::shuffle(order.begin() + 1, order.end(), std::mt19937(static_cast<uint32_t>(generation)));
  }
  const std::byte* Slot(int32_t slot) const {
    return copier.table().Data(static_cast<uint64_t>(slot));
  }
  bool SlotHolds(int32_t slot, const Bytes& bytes) const {
    return std::memcmp(Slot(slot), bytes.data(), bytes.size()) == 0;
  }
  // The arena's data with what some slots hold left out; the gap behind each slot stays.
  Bytes AllBut(const std::vector<int32_t>& slots) const {
    Bytes all(data_bytes);
    std::memcpy(all.data(), data, data_bytes);
    for (const int32_t slot : slots) std::memset(all.data() + (Slot(slot) - data), 0, slot_bytes);
    return all;
  }
  std::vector<CopyStatus> Store(const Batch& batch, std::vector<uint64_t>* checksums) {
    std::vector<CopyStatus> status(batch.slots.size());
    checksums->assign(batch.slots.size(), 77);
    copier.Store(batch.request(), status.data(), checksums->data());
    return status;
  }

  const size_t slot_bytes;
  TestArena arena;
  Device device;
  SlotCopier copier;
  std::byte* const data;
  const size_t data_bytes;
  std::vector<int32_t> order;  // of slots
  uint64_t generation = 1;
};

// The first number that is none, from either end.
size_t Past(size_t n, size_t i) { return i % 2 == 0 ? n : static_cast<size_t>(-1); }

// ---- stores -------------------------------------------------------------------------------------

enum class StoreCase { kGood, kBadBlock, kStale, kBadSlot, kAgain, kCount };

void TestStores(World* world, size_t n, size_t shift) {
  Batch batch;
  std::vector<StoreCase> cases;
  std::vector<int32_t> written;
  for (size_t i = 0; i < n; ++i) {
    const auto what = static_cast<StoreCase>((i + shift) % static_cast<size_t>(StoreCase::kCount));
    const int32_t slot = world->order[i];
    const size_t block = kMostItems - 1 - i;
    cases.push_back(what);
    if (what == StoreCase::kStale || what == StoreCase::kAgain) {  // it is there already
      Batch earlier;
      std::vector<uint64_t> checksums;
      earlier.Add(block, slot, world->generation, KeyOf(slot));
      CHECK(world->Store(earlier, &checksums)[0] == CopyStatus::kOk);
    }
    if (what == StoreCase::kGood) written.push_back(slot);
    batch.Add(what == StoreCase::kBadBlock ? Past(kBlocks, i) : block,
              what == StoreCase::kBadSlot ? static_cast<int32_t>(Past(kSlots, i)) : slot,
              what == StoreCase::kStale ? world->generation - 1 : world->generation, KeyOf(slot));
  }
  const Bytes arena_before = world->AllBut(written);
  const std::vector<Bytes> device_before = world->device.AllBut({});
  std::vector<uint64_t> checksums;
  const std::vector<CopyStatus> status = world->Store(batch, &checksums);
  for (size_t i = 0; i < n; ++i) {
    const Bytes block = world->device.Block(kMostItems - 1 - i);
    const bool ok = cases[i] == StoreCase::kGood || cases[i] == StoreCase::kAgain;
    CHECK(checksums[i] == (ok ? Xxh3_64(block.data(), block.size()) : 0));
    if (ok) {
      CHECK(status[i] == CopyStatus::kOk);
      CHECK(world->SlotHolds(batch.slots[i], block));
    } else if (cases[i] == StoreCase::kStale) {
      CHECK(status[i] == CopyStatus::kGeneration);
    } else {
      CHECK(status[i] == CopyStatus::kRange);
    }
  }
  CHECK(world->AllBut(written) == arena_before);  // S1
  CHECK(world->device.AllBut({}) == device_before);
}

// ---- loads --------------------------------------------------------------------------------------

enum class LoadCase {
  kVerified,
  kWrongKey,
  kUnverified,
  kBadBlock,
  kBroken,  // a byte of the slot has changed
  kStale,
  kBadSlot,
  kCount
};

CopyStatus Expected(LoadCase what) {
  switch (what) {
    case LoadCase::kWrongKey:
      return CopyStatus::kIdentity;
    case LoadCase::kStale:
      return CopyStatus::kGeneration;
    case LoadCase::kBroken:
      return CopyStatus::kChecksum;
    case LoadCase::kBadBlock:
    case LoadCase::kBadSlot:
      return CopyStatus::kRange;
    default:
      return CopyStatus::kOk;
  }
}

// Item i was stored from block kMostItems - 1 - i and is loaded into block kBlocks - 1 - i.
void TestLoads(World* world, size_t n, size_t shift) {
  Batch stored;
  for (size_t i = 0; i < n; ++i) {
    stored.Add(kMostItems - 1 - i, world->order[i], world->generation, KeyOf(world->order[i]));
  }
  std::vector<uint64_t> checksums;
  for (const CopyStatus each : world->Store(stored, &checksums)) CHECK(each == CopyStatus::kOk);

  Batch batch;
  std::vector<LoadCase> cases;
  std::vector<uint8_t> verify;
  std::vector<size_t> named;
  for (size_t i = 0; i < n; ++i) {
    const auto what = static_cast<LoadCase>((i + shift) % static_cast<size_t>(LoadCase::kCount));
    const int32_t slot = world->order[i];
    const size_t block = kBlocks - 1 - i;
    cases.push_back(what);
    verify.push_back(what != LoadCase::kUnverified);
    if (what != LoadCase::kBadBlock) named.push_back(block);
    if (what == LoadCase::kBroken) {
      const size_t at = i * 7919 % world->slot_bytes;
      world->copier.table().Data(static_cast<uint64_t>(slot))[at] ^= std::byte{1};
    }
    batch.Add(what == LoadCase::kBadBlock ? Past(kBlocks, i) : block,
              what == LoadCase::kBadSlot ? static_cast<int32_t>(Past(kSlots, i)) : slot,
              what == LoadCase::kStale ? world->generation - 1 : world->generation,
              KeyOf(what == LoadCase::kWrongKey ? slot + 1 : slot));
  }
  const Bytes arena_before = world->AllBut({});
  const std::vector<Bytes> device_before = world->device.AllBut(named);
  std::vector<CopyStatus> status(n);
  world->copier.Load(batch.request(), verify.data(), status.data());
  for (size_t i = 0; i < n; ++i) {
    CHECK(status[i] == Expected(cases[i]));
    if (status[i] == CopyStatus::kOk) {  // S2
      CHECK(world->device.Block(kBlocks - 1 - i) == world->device.Block(kMostItems - 1 - i));
    }
  }
  CHECK(world->AllBut({}) == arena_before);
  CHECK(world->device.AllBut(named) == device_before);  // S1
}

void TestBatches(CpuPath path, const std::vector<size_t>& pieces,
                 const std::vector<size_t>& batches = kBatches) {
  for (const int threads : kThreads) {
    World world(pieces, threads, path);
    for (const size_t n : batches) {
      // Each case stands at each place once.
      for (size_t shift = 0; shift < static_cast<size_t>(LoadCase::kCount); ++shift) {
        world.Renew();
        TestStores(&world, n, shift);
        world.Renew();
        TestLoads(&world, n, shift);
      }
    }
  }
}

}  // namespace
}  // namespace kvmem

int main() {
  using kvmem::CpuPath;
  for (CpuPath path : {CpuPath::kPlain, CpuPath::kAvx2, CpuPath::kAvx512}) {
    // Under TSan all are the plain one.
    if (path > kvmem::DetectCpu() || kvmem::KernelsFor(path).path != path) continue;
    kvmem::TestBatches(path, {4096, 2048, 1024});   // whole hash blocks: in step, from registers
    kvmem::TestBatches(path, {5120});               // the same in one layer
    kvmem::TestBatches(path, {4099, 77, 1});        // odd: through the private buffer
    kvmem::TestBatches(path, {16385 + 4096}, {2});  // more than the buffer holds
  }
  return 0;
}
