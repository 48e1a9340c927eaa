// A load that says ok has the right bytes: while slots are reused by other threads, and with the
// other side's steps forced into the middle of a copy (a protected page stops the copier there).
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "arena_bytes.h"
#include "check.h"
#include "copy/slot_copier.h"
#include "guarded_bytes.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

constexpr CpuPath kPaths[] = {CpuPath::kPlain, CpuPath::kAvx2, CpuPath::kAvx512};

using Key = std::array<std::byte, kKeyBytes>;

Key KeyOf(uint64_t slot, uint64_t generation) {
  Key key = {};
  std::memcpy(key.data(), &slot, sizeof slot);
  std::memcpy(key.data() + 8, &generation, sizeof generation);
  return key;
}

unsigned char ByteOf(uint64_t slot, uint64_t generation, size_t at) {
  return static_cast<unsigned char>(slot * 31 + generation * 7 + at * 3 + (at >> 8));
}

// Blocks of two pieces, page-aligned, every piece on pages of its own.
class Device {
 public:
  Device(size_t n_blocks, size_t first_piece, size_t second_piece)
      : pieces_{first_piece, second_piece}, n_blocks_(n_blocks) {
    stride_ = RoundUp(std::max(first_piece, second_piece), kPage);
    void* const mapped =
        mmap(nullptr, Bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mapped != MAP_FAILED);
    base_ = static_cast<std::byte*>(mapped);
  }
  ~Device() { munmap(base_, Bytes()); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  std::byte* Piece(int layer, size_t block) {
    return base_ + (static_cast<size_t>(layer) * n_blocks_ + block) * stride_;
  }
  void Register(SlotCopier& copier, size_t group = 0) {
    std::string error;
    CHECK(copier.RegisterLayers(
        group, {{Piece(0, 0), stride_, pieces_[0]}, {Piece(1, 0), stride_, pieces_[1]}}, n_blocks_,
        &error));
  }
  void Fill(size_t block, uint64_t slot, uint64_t generation) {
    for (int layer : {0, 1}) {
      for (size_t at = 0; at < pieces_[layer]; ++at) {
        Piece(layer, block)[at] = std::byte{ByteOf(slot, generation, at + Before(layer))};
      }
    }
  }
  bool Holds(size_t block, uint64_t slot, uint64_t generation) {
    for (int layer : {0, 1}) {
      for (size_t at = 0; at < pieces_[layer]; ++at) {
        const auto wanted = std::byte{ByteOf(slot, generation, at + Before(layer))};
        if (Piece(layer, block)[at] != wanted) return false;
      }
    }
    return true;
  }
  size_t block_bytes() const { return pieces_[0] + pieces_[1]; }

 private:
  size_t Bytes() const { return 2 * n_blocks_ * stride_; }
  size_t Before(int layer) const { return layer == 0 ? 0 : pieces_[0]; }

  size_t pieces_[2];
  size_t n_blocks_;
  size_t stride_;
  std::byte* base_;
};

CopyStatus Store(SlotCopier& copier, int32_t block, int32_t slot, uint64_t generation,
                 uint64_t* checksum, size_t group = 0) {
  const Key key = KeyOf(static_cast<uint64_t>(slot), generation);
  CopyStatus status;
  copier.Store({group, 1, &block, &slot, &generation, key.data()}, &status, checksum);
  return status;
}

CopyStatus Load(SlotCopier& copier, int32_t block, int32_t slot, uint64_t generation, bool verify,
                size_t group = 0) {
  const Key key = KeyOf(static_cast<uint64_t>(slot), generation);
  const uint8_t flag = verify;
  CopyStatus status;
  copier.Load({group, 1, &block, &slot, &generation, key.data()}, &flag, &status);
  return status;
}

// ---- slots reused under readers -----------------------------------------------------------------

constexpr int kSlots = 4;
constexpr int kWriters = 2;
constexpr int kReaders = 2;
constexpr uint64_t kGenerations = 200;

void TestReuse(CpuPath path, size_t first_piece, size_t second_piece) {
  TestArena arena(kSlots, first_piece + second_piece);
  Device device(kWriters + kReaders, first_piece, second_piece);
  SlotCopier copier(arena.table(), 1, path);
  device.Register(copier);
  std::atomic<int> writing{kWriters};
  std::vector<std::thread> threads;
  for (int32_t writer = 0; writer < kWriters; ++writer) {
    threads.emplace_back([&, writer] {
      uint64_t checksum;
      for (uint64_t generation = 1; generation <= kGenerations; ++generation) {
        for (int32_t slot = writer; slot < kSlots; slot += kWriters) {
          device.Fill(static_cast<size_t>(writer), static_cast<uint64_t>(slot), generation);
          CHECK(Store(copier, writer, slot, generation, &checksum) == CopyStatus::kOk);
        }
      }
      writing.fetch_sub(1);
    });
  }
  for (int32_t reader = 0; reader < kReaders; ++reader) {
    threads.emplace_back([&, reader] {
      const int32_t block = kWriters + reader;
      uint64_t right = 0;
      // Once the writers are done every load must succeed, so this ends and is not vacuous.
      for (uint64_t turn = 0; writing.load() > 0 || right < kSlots; ++turn) {
        const auto slot = static_cast<int32_t>(turn % kSlots);
        const uint64_t generation = copier.table().Generation(static_cast<uint64_t>(slot));
        if (generation == 0) continue;
        if (Load(copier, block, slot, generation, turn / kSlots % 2 == 0) != CopyStatus::kOk) {
          continue;
        }
        CHECK(device.Holds(static_cast<size_t>(block), static_cast<uint64_t>(slot), generation));
        ++right;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// ---- steps in the middle of a copy --------------------------------------------------------------

// What happens when the copier first touches the protected page; then the page opens.
struct Interruption {
  void* page;
  void (*act)();
  bool done;
};
Interruption interruption;
const SlotTable* interrupted_table;
Device* interrupted_device;
size_t interrupted_bytes;

void OnFault(int, siginfo_t* info, void*) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  const auto page = reinterpret_cast<uintptr_t>(interruption.page);
  if (interruption.done || at < page || at >= page + kPage) {
    signal(SIGSEGV, SIG_DFL);  // a real one
    return;
  }
  interruption.done = true;
  mprotect(interruption.page, kPage, PROT_READ | PROT_WRITE);
  interruption.act();
}

void Interrupt(void* page, void (*act)()) {
  interruption = {page, act, false};
  CHECK(mprotect(page, kPage, PROT_NONE) == 0);
}

void GiveSlotAway() {
  interrupted_table->Claim(0, 2);
  std::memset(interrupted_table->Data(0), 0xEE, interrupted_bytes);
}
void TakeAndFillAgain() {
  GiveSlotAway();
  const Key key = KeyOf(0, 2);
  const uint64_t checksum = Xxh3_64(interrupted_table->Data(0), interrupted_bytes);
  interrupted_table->Complete(0, 2, {0, interrupted_bytes, key.data()}, checksum);
}
void ChangeSource() {
  for (int layer : {0, 1}) std::memset(interrupted_device->Piece(layer, 0), 0xDD, kPage);
}
void FlipInSlot() { interrupted_table->Data(0)[interrupted_bytes - 1] ^= std::byte{1}; }

struct Scene {
  Scene(CpuPath path, size_t first_piece, size_t second_piece)
      : arena(1, first_piece + second_piece),
        device(2, first_piece, second_piece),
        copier(arena.table(), 1, path),
        table(copier.table()) {
    device.Register(copier);
    interrupted_table = &table;
    interrupted_device = &device;
    interrupted_bytes = first_piece + second_piece;
    device.Fill(0, 0, 1);
  }
  TestArena arena;
  Device device;
  SlotCopier copier;
  const SlotTable& table;
  uint64_t checksum = 0;
};

void TestOvertakenLoad(CpuPath path, size_t first_piece, size_t second_piece) {
  for (bool verify : {false, true}) {
    for (auto act : {GiveSlotAway, TakeAndFillAgain}) {
      Scene scene(path, first_piece, second_piece);
      CHECK(Store(scene.copier, 0, 0, 1, &scene.checksum) == CopyStatus::kOk);
      Interrupt(scene.device.Piece(1, 1), act);
      CHECK(Load(scene.copier, 1, 0, 1, verify) == CopyStatus::kGeneration);
      CHECK(interruption.done);
    }
  }
}

void TestBytesChangedUnderLoad(CpuPath path, size_t first_piece, size_t second_piece) {
  Scene scene(path, first_piece, second_piece);
  CHECK(Store(scene.copier, 0, 0, 1, &scene.checksum) == CopyStatus::kOk);
  Interrupt(scene.device.Piece(0, 1), FlipInSlot);
  CHECK(Load(scene.copier, 1, 0, 1, true) == CopyStatus::kChecksum);
  CHECK(interruption.done);
}

void TestOvertakenStore(CpuPath path, size_t first_piece, size_t second_piece) {
  for (auto act : {GiveSlotAway, TakeAndFillAgain}) {
    Scene scene(path, first_piece, second_piece);
    Interrupt(scene.device.Piece(1, 0), act);
    CHECK(Store(scene.copier, 0, 0, 1, &scene.checksum) == CopyStatus::kGeneration);
    CHECK(interruption.done && scene.checksum == 0);
    CHECK(!scene.table.IsComplete(0, 1));
  }
}

void TestSourceChangedUnderStore(CpuPath path, size_t first_piece, size_t second_piece) {
  Scene scene(path, first_piece, second_piece);
  Interrupt(scene.device.Piece(1, 0), ChangeSource);
  CHECK(Store(scene.copier, 0, 0, 1, &scene.checksum) == CopyStatus::kOk);
  CHECK(interruption.done);
  CHECK(scene.checksum == Xxh3_64(scene.table.Data(0), scene.device.block_bytes()));
}

// While a store is under way its slot answers no reader; it is complete only afterwards.
CopyStatus status_meanwhile;
SlotCopier* interrupted_copier;
void LoadMeanwhile() { status_meanwhile = Load(*interrupted_copier, 1, 0, 1, false); }

void TestUnfinishedStoreAnswersNobody(CpuPath path, size_t first_piece, size_t second_piece) {
  Scene scene(path, first_piece, second_piece);
  interrupted_copier = &scene.copier;
  status_meanwhile = CopyStatus::kOk;
  Interrupt(scene.device.Piece(1, 0), LoadMeanwhile);
  CHECK(Store(scene.copier, 0, 0, 1, &scene.checksum) == CopyStatus::kOk);
  CHECK(interruption.done && status_meanwhile == CopyStatus::kIdentity);
}

// ---- the header ---------------------------------------------------------------------------------

void TestWrongGeometryIsRefused() {
  std::string error;
  const auto refused = [&error](void (*change)(ArenaHeader*)) {
    TestArena arena(3, 1000);
    CHECK(arena.Opens(&error));
    change(arena.header());
    arena.Seal();
    return !arena.Opens(&error);
  };
  CHECK(refused([](ArenaHeader* h) { h->n_slots = 0; }));
  CHECK(refused([](ArenaHeader* h) { h->n_slots += 1; }));
  CHECK(refused([](ArenaHeader* h) { h->slot_bytes = 0; }));
  CHECK(refused([](ArenaHeader* h) { h->slot_stride += 64; }));
  CHECK(refused([](ArenaHeader* h) { h->descriptors_offset = 0; }));
  CHECK(refused([](ArenaHeader* h) { h->stats_offset = kArenaHeaderBytes; }));
  CHECK(refused([](ArenaHeader* h) {  // no room for the switch
    h->stats_bytes = h->data_offset - h->stats_offset;
  }));
  CHECK(refused([](ArenaHeader* h) {  // a sum that wraps round
    h->stats_offset = uint64_t{0} - kPage;
    h->stats_bytes = kPage;
    h->data_offset = 0;
    h->n_slots = 1;
    h->slot_bytes = h->slot_stride = h->total_bytes;
  }));
  CHECK(refused([](ArenaHeader* h) { h->data_offset += kArenaAlign; }));
  CHECK(refused([](ArenaHeader* h) { h->total_bytes += 1; }));
  CHECK(refused([](ArenaHeader* h) { h->version += 1; }));
  CHECK(refused([](ArenaHeader* h) { h->ranks = 0; }));
  CHECK(refused([](ArenaHeader* h) { h->ranks = 2; }));
  CHECK(refused([](ArenaHeader* h) { h->ranks = kMaxRanks + 1; }));
}

// ---- ranks --------------------------------------------------------------------------------------

void TestRanksShareNothing() {
  constexpr uint32_t kRanks = 3;
  constexpr size_t kBytes = 1000;
  TestArena arena(2, kBytes, kRanks);
  std::string error;
  CHECK(!arena.Opens(&error, kRanks));
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    const SlotTable table = arena.table(rank);
    for (uint64_t slot : {0, 1}) {
      CHECK(table.Generation(slot) == 0);  // no other rank's claim is seen here
      CHECK(table.Claim(slot, rank + 1));
      std::memset(table.Data(slot), static_cast<int>(16 * rank + slot), kBytes);
      const Key key = KeyOf(slot, rank);
      CHECK(table.Complete(slot, rank + 1, {rank, kBytes, key.data()}, rank));
    }
  }
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    const SlotTable table = arena.table(rank);
    for (uint64_t slot : {0, 1}) {
      const Key key = KeyOf(slot, rank);
      CHECK(table.IsComplete(slot, rank + 1) &&
            table.HasIdentity(slot, {rank, kBytes, key.data()}));
      CHECK(!table.HasIdentity(slot, {rank + 1, kBytes, key.data()}));
      CHECK(!table.HasIdentity(slot, {rank, kBytes - 1, key.data()}));
      for (size_t at = 0; at < kBytes; ++at) {
        CHECK(table.Data(slot)[at] == std::byte(16 * rank + slot));
      }
    }
  }
}

// ---- groups -------------------------------------------------------------------------------------

// Two groups whose blocks differ in bytes take turns in one slot.
void TestGroupsTakeTurnsInASlot(CpuPath path) {
  TestArena arena(1, 6000);
  Device large(2, 4000, 2000);
  Device small(2, 1024, 700);
  SlotCopier copier(arena.table(), 1, path);
  std::string error;
  CHECK(!copier.RegisterLayers(2, {{large.Piece(0, 0), 8192, 6001}}, 2, &error));  // no room
  CHECK(!copier.registered(2));
  large.Register(copier);
  small.Register(copier, 1);
  uint64_t checksum = 0;
  uint64_t generation = 0;
  for (size_t group : {0, 1, 0, 1, 1, 0}) {
    Device& device = group == 0 ? large : small;
    device.Fill(0, 0, ++generation);
    CHECK(Store(copier, 0, 0, generation, &checksum, group) == CopyStatus::kOk);
    CHECK(checksum == Xxh3_64(copier.table().Data(0), device.block_bytes()));
    CHECK(Load(copier, 1, 0, generation, true, 1 - group) == CopyStatus::kIdentity);
    CHECK(Load(copier, 1, 0, generation, true, group) == CopyStatus::kOk);
    CHECK(device.Holds(1, 0, generation));
  }
}

void RunAll(CpuPath path, size_t first_piece, size_t second_piece) {
  TestReuse(path, first_piece, second_piece);
  TestOvertakenLoad(path, first_piece, second_piece);
  TestBytesChangedUnderLoad(path, first_piece, second_piece);
  TestOvertakenStore(path, first_piece, second_piece);
  TestSourceChangedUnderStore(path, first_piece, second_piece);
  TestUnfinishedStoreAnswersNobody(path, first_piece, second_piece);
}

}  // namespace
}  // namespace kvmem

int main() {
  struct sigaction action = {};
  action.sa_sigaction = kvmem::OnFault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  CHECK(sigaction(SIGSEGV, &action, nullptr) == 0);
  kvmem::TestWrongGeometryIsRefused();
  kvmem::TestRanksShareNothing();
  for (kvmem::CpuPath path : kvmem::kPaths) {
    // Under TSan all are the plain one.
    if (path > kvmem::DetectCpu() || kvmem::KernelsFor(path).path != path) continue;
    kvmem::TestGroupsTakeTurnsInASlot(path);
    kvmem::RunAll(path, 8192, 6144);  // whole hash blocks: in step, from registers
    kvmem::RunAll(path, 8191, 5001);  // odd: through the private buffer
  }
  return 0;
}
