// The scrub finds what is wrong in a slot and calls nothing else wrong: beside writers of the same
// slots, and with a writer's steps forced into the middle of a look (a protected page stops it
// there).
#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "arena_bytes.h"
#include "check.h"
#include "copy/cpu/kernels.h"
#include "copy/slot_scrub.h"
#include "guarded_bytes.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

using Key = std::array<std::byte, kKeyBytes>;

Scrubbed Scrub(const SlotTable& table, uint64_t slot, uint64_t generation) {
  uint64_t n_bytes = 0;
  const Scrubbed found = ScrubShare(table, slot, generation, &n_bytes);
  CHECK(n_bytes <= table.slot_bytes());
  return found;
}

// As a copier stores: claim, bytes, identity, complete. The bytes are words that TSan sees.
void Store(const SlotTable& table, uint64_t slot, uint64_t generation, uint64_t length) {
  std::vector<std::byte> bytes(length);
  for (size_t at = 0; at < length; ++at) {
    bytes[at] = static_cast<std::byte>(slot * 31 + generation * 7 + at * 3 + (at >> 8));
  }
  CHECK(table.Claim(slot, generation));
  KernelsFor(CpuPath::kPlain).fence();
  CopyShared(table.Data(slot), bytes.data(), length);
  KernelsFor(CpuPath::kPlain).fence();
  const Key key = {};
  CHECK(table.Complete(slot, generation, {0, length, key.data()}, Xxh3_64(bytes.data(), length)));
}

// Every length that the hash or the staging treats in its own way; the last slot of the arena ends
// against a page that nobody may touch.
void AnyFlippedBitIsFound() {
  constexpr uint64_t kShare = 20480;
  TestArena arena(4, kShare, 2);
  uint64_t generation = 0;
  for (const uint64_t length : {1, 7, 240, 241, 1024, 1025, 16383, 16384, 16385, 20480}) {
    ++generation;
    for (const uint32_t rank : {0u, 1u}) Store(arena.table(rank), 3, generation, length);
    for (const uint32_t rank : {0u, 1u}) {
      const SlotTable table = arena.table(rank);
      CHECK(Scrub(table, 3, generation) == Scrubbed::kSound);
      for (const uint64_t at : {uint64_t{0}, length / 2, length - 1}) {
        table.Data(3)[at] ^= std::byte{0x10};
        CHECK(Scrub(table, 3, generation) == Scrubbed::kBad);
        CHECK(Scrub(arena.table(1 - rank), 3, generation) == Scrubbed::kSound);
        table.Data(3)[at] ^= std::byte{0x10};
      }
      if (length < kShare) {  // what is not of the block is nobody's
        table.Data(3)[length] ^= std::byte{1};
        CHECK(Scrub(table, 3, generation) == Scrubbed::kSound);
      }
    }
  }
}

void ADamagedDescriptorIsNotBelieved() {
  TestArena arena(64, 4096);
  const SlotTable table = arena.table();
  Store(table, 63, 1, 4096);
  SlotDescriptor& d = table.Descriptor(63);
  for (const uint64_t length : {uint64_t{0}, uint64_t{4097}, uint64_t{1} << 40, ~uint64_t{0}}) {
    d.length.store(length);
    CHECK(Scrub(table, 63, 1) == Scrubbed::kBad);
  }
  d.length.store(4096);
  d.checksum.fetch_xor(1);
  CHECK(Scrub(table, 63, 1) == Scrubbed::kBad);
  d.checksum.fetch_xor(1);
  CHECK(Scrub(table, 63, 1) == Scrubbed::kSound);
  for (const uint64_t generation : {uint64_t{0}, uint64_t{2}, kMaxGeneration, ~uint64_t{0}}) {
    CHECK(Scrub(table, 63, generation) == Scrubbed::kMovedOn);
  }
  CHECK(Scrub(table, 0, 1) == Scrubbed::kMovedOn);  // never written
  CHECK(table.Claim(63, 2));
  CHECK(Scrub(table, 63, 1) == Scrubbed::kMovedOn);
  CHECK(Scrub(table, 63, 2) == Scrubbed::kMovedOn);  // being written
}

// ---- a writer in the middle of a look -----------------------------------------------------------

constexpr uint64_t kShare = 4 * kPage;
const SlotTable* interrupted;
void* protected_page;
void (*act)();

void OnFault(int, siginfo_t* info, void*) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  const auto page = reinterpret_cast<uintptr_t>(protected_page);
  if (act == nullptr || at < page || at >= page + kPage) {
    signal(SIGSEGV, SIG_DFL);  // a real one
    return;
  }
  mprotect(protected_page, kPage, PROT_READ | PROT_WRITE);
  void (*const now)() = act;
  act = nullptr;
  now();
}

void TakeAndFill() {
  interrupted->Claim(0, 2);
  std::memset(interrupted->Data(0), 0xEE, kShare);
}
void TakeFillAndComplete() {
  TakeAndFill();
  const Key key = {};
  interrupted->Complete(0, 2, {0, kShare, key.data()}, Xxh3_64(interrupted->Data(0), kShare));
}
void Flip() { interrupted->Data(0)[kShare - 1] ^= std::byte{1}; }

Scrubbed Interrupted(void (*meanwhile)()) {
  TestArena arena(4, kShare);
  const SlotTable table = arena.table();
  Store(table, 0, 1, kShare);
  interrupted = &table;
  protected_page = table.Data(0) + kPage;
  act = meanwhile;
  CHECK(mprotect(protected_page, kPage, PROT_NONE) == 0);
  const Scrubbed found = Scrub(table, 0, 1);
  CHECK(act == nullptr);  // it was met
  return found;
}

void AWriterInTheMiddleIsNoFault() {
  struct sigaction action = {};
  action.sa_sigaction = OnFault;
  action.sa_flags = SA_SIGINFO;
  CHECK(sigaction(SIGSEGV, &action, nullptr) == 0);
  CHECK(Interrupted(TakeAndFill) == Scrubbed::kMovedOn);
  CHECK(Interrupted(TakeFillAndComplete) == Scrubbed::kMovedOn);
  CHECK(Interrupted(Flip) == Scrubbed::kBad);  // nobody owns up to it
  signal(SIGSEGV, SIG_DFL);
}

// ---- beside writers -----------------------------------------------------------------------------

void NothingIsCalledBadBesideWriters() {
  constexpr uint64_t kSlots = 4;
  constexpr uint64_t kGenerations = 300;
  constexpr uint64_t kBytes = 5000;
  TestArena arena(kSlots, kBytes);
  const SlotTable table = arena.table();
  std::atomic<int> writing{2};
  std::vector<std::thread> threads;
  for (uint64_t writer = 0; writer < 2; ++writer) {
    threads.emplace_back([&, writer] {
      for (uint64_t generation = 1; generation <= kGenerations; ++generation) {
        for (uint64_t slot = writer; slot < kSlots; slot += 2) {
          Store(table, slot, generation, kBytes - generation);
        }
      }
      --writing;
    });
  }
  for (int reader = 0; reader < 2; ++reader) {
    threads.emplace_back([&] {
      // Once the writers are done every look must end well, so this ends and is not vacuous.
      uint64_t sound = 0;
      for (uint64_t turn = 0; writing.load() > 0 || sound < kSlots; ++turn) {
        const uint64_t slot = turn % kSlots;
        const Scrubbed found = Scrub(table, slot, table.Generation(slot));
        CHECK(found != Scrubbed::kBad);
        sound += found == Scrubbed::kSound;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (uint64_t slot = 0; slot < kSlots; ++slot) {
    CHECK(Scrub(table, slot, kGenerations) == Scrubbed::kSound);
  }
}

}  // namespace
}  // namespace kvmem

int main() {
  kvmem::AnyFlippedBitIsFound();
  kvmem::ADamagedDescriptorIsNotBelieved();
  kvmem::AWriterInTheMiddleIsNoFault();
  kvmem::NothingIsCalledBadBesideWriters();
}
