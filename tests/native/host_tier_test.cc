// HostTier: what CheckIntegrity() must see when a structure is broken on purpose, and writers,
// readers and lessees side by side. The "bytes" of a slot are a plain array, so that a slot that is
// reused under a lease, or under a writer, is a data race that ThreadSanitizer reports and a wrong
// value that CHECK reports. One prompt's depth is told step by step (story.h), so that readers know
// what must match and what must not.
#include "pool/host_tier.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#include "check.h"
#include "keys.h"
#include "story.h"

namespace kvmem {

struct PrefixIndexPeer {
  static auto& Node(PrefixIndex& index, SlotId slot) { return index.nodes_[slot]; }
  static auto& Cells(PrefixIndex& index) { return index.cells_; }
  static size_t CellCount(PrefixIndex& index) { return index.n_cells_; }
  static void SetState(PrefixIndex& index, SlotId slot, BlockState state, uint8_t tiers) {
    index.SetState(slot, state, tiers);
  }
};

struct HostTierPeer {
  static PrefixIndex& Index(HostTier& tier) { return tier.index_; }
  static EvictionOrder& Order(HostTier& tier) { return *tier.order_; }
  static auto& Leases(HostTier& tier) { return tier.leases_; }
  static SlotLinks& Links(HostTier& tier) { return tier.links_; }
  static auto& Free(HostTier& tier) { return tier.free_; }
  static auto& Pending(HostTier& tier) { return tier.pending_; }
  static auto& Kept(HostTier& tier) { return tier.kept_; }
  static auto& Failed(HostTier& tier) { return tier.failed_; }
  static void Break(SlotLinks& links, SlotId slot) { links.next_[slot] = slot; }
};

namespace {

using Peer = HostTierPeer;
using IndexPeer = PrefixIndexPeer;

size_t Put(HostTier* tier, uint64_t prompt, size_t n) {
  const HostTier::Reserved got = tier->Reserve(TestChain(prompt, n), 0, n);
  const std::vector<uint64_t> sums(got.slots.size(), 9);
  return tier->Publish(got.slots.data(), got.generations.data(), sums.data(), got.slots.size());
}

// Six published blocks in slots 0..5, a lease on the last, two pending in slots 6 and 7, one in
// slot 8 that failed a check and is kept.
std::unique_ptr<HostTier> Furnished(const std::string& order) {
  std::unique_ptr<HostTier> tier = HostTier::Create(16, order, 1);
  CHECK(Put(tier.get(), 1, 6) == 6);
  CHECK(tier->Acquire(TestChain(1, 6), 0, 6).lease == 1);
  CHECK(tier->Reserve(TestChain(2, 2), 0, 2).slots.size() == 2);
  CHECK(Put(tier.get(), 3, 1) == 1);
  CHECK(tier->Quarantine(8, 1) == 1 && tier->Kept().slots == std::vector<int32_t>{8});
  CHECK(tier->CheckIntegrity().empty());
  return tier;
}

struct Damage {
  const char* expected;  // part of a line that must be reported
  std::function<void(HostTier&)> inflict;
};

const Damage kDamages[] = {
    {"I2: the parent of slot 3",
     [](HostTier& t) { IndexPeer::SetState(Peer::Index(t), 2, BlockState::kCondemned, 0); }},
    {"index 1: the key of slot 4",
     [](HostTier& t) { IndexPeer::Node(Peer::Index(t), 4).key[3] ^= 1; }},
    {"index 1:",
     [](HostTier& t) {
       auto& cells = IndexPeer::Cells(Peer::Index(t));
       for (size_t i = 0; i < IndexPeer::CellCount(Peer::Index(t)); ++i) cells[i] = 0;
     }},
    {"index 3: slot 2 counts 5 children",
     [](HostTier& t) { IndexPeer::Node(Peer::Index(t), 2).children = 5; }},
    {"I2: the depth of slot 3", [](HostTier& t) { IndexPeer::Node(Peer::Index(t), 3).depth = 9; }},
    {"I3: slot 5 counts 0 leases",
     [](HostTier& t) { IndexPeer::Node(Peer::Index(t), 5).leases = 0; }},
    {"I3: slot 12 is leased and holds no block", [](HostTier& t) { Peer::Leases(t)[7] = 12; }},
    {"I3: lease 7 names no slot", [](HostTier& t) { Peer::Leases(t)[7] = 999; }},
    {"I4: the tiers of slot 6",
     [](HostTier& t) { IndexPeer::SetState(Peer::Index(t), 6, BlockState::kPending, kTierHost); }},
    {"index 4: readers are told otherwise of slot 1",
     [](HostTier& t) { IndexPeer::Node(Peer::Index(t), 1).tag.fetch_xor(1u << 7); }},
    {"I7: the free list", [](HostTier& t) { Peer::Links(t).PopFront(&Peer::Free(t)); }},
    {"I7: the pending list", [](HostTier& t) { Peer::Links(t).PopFront(&Peer::Pending(t)); }},
    {"I7: the free list", [](HostTier& t) { Peer::Break(Peer::Links(t), 10); }},
    {"I7: the kept list", [](HostTier& t) { Peer::Links(t).PopFront(&Peer::Kept(t)); }},
    {"I7: slot 8 is in the kept list and is not kept",
     [](HostTier& t) { IndexPeer::SetState(Peer::Index(t), 8, BlockState::kFree, 0); }},
    {"I2: slot 8 should have no parent",
     [](HostTier& t) { IndexPeer::Node(Peer::Index(t), 8).parent = 5; }},
    {"I7: 2 blocks are kept, 1 may be",
     [](HostTier& t) {
       Peer::Links(t).Remove(&Peer::Free(t), 9);
       Peer::Links(t).PushBack(&Peer::Kept(t), 9);
     }},
    {"I7: slot 3 is to be kept and is not condemned",
     [](HostTier& t) { Peer::Failed(t).insert(3); }},
    {"I7: published or orphaned blocks are miscounted",
     [](HostTier& t) { IndexPeer::SetState(Peer::Index(t), 5, BlockState::kCondemned, 0); }},
    {"forgot evictable slot 5",
     [](HostTier& t) {
       Peer::Order(t).PopVictim(0);  // goes dormant: it is leased
       IndexPeer::Node(Peer::Index(t), 5).leases = 0;
     }},
};

void EveryDamageIsReported() {
  for (const std::string& order : OrderNames()) {
    for (const Damage& damage : kDamages) {
      const std::unique_ptr<HostTier> tier = Furnished(order);
      damage.inflict(*tier);
      bool seen = false;
      for (const std::string& fault : tier->CheckIntegrity()) {
        seen |= fault.find(damage.expected) != std::string::npos;
      }
      if (!seen) std::fprintf(stderr, "%s: not reported: %s\n", order.c_str(), damage.expected);
      CHECK(seen);
    }
  }
}

// --- stress ---

constexpr uint32_t kSlots = 96;
constexpr uint32_t kPrompts = 12;
constexpr uint32_t kDepth = 16;
constexpr uint32_t kPublishedDepth = 13;  // blocks below it are reserved and always given up
constexpr uint64_t kKept = 500;           // the prompt that has a story
constexpr int kWriters = 2;
constexpr int kReaders = 2;
constexpr int kSteps = 20'000;
constexpr int kTurnsAKeeperStep = 20;  // of all writers together
constexpr int kLead = 20;              // keeper's steps that either side may be ahead
constexpr int kKeeperSteps = kWriters * kSteps / kTurnsAKeeperStep;

// Prompts fork: the first half of the blocks is shared by three prompts.
class Forked final : public KeyList {
 public:
  Forked(uint64_t prompt, size_t n) : KeyList(n), prompt_(prompt) {}
  Key At(size_t i) const override {
    return i < kDepth / 2 ? TestKey(1000 + prompt_ / 3, i + 1) : TestKey(prompt_, i + 1);
  }

 private:
  const uint64_t prompt_;
};

struct World {
  std::unique_ptr<HostTier> tier;
  std::vector<uint64_t> bytes = std::vector<uint64_t>(kSlots);  // plain on purpose
  std::atomic<int> writers_left{kWriters};
  Story story{2 * kKeeperSteps};  // of kKept
  // The lock is unfair: without these one side would starve.
  std::atomic<int> turns{0};
  std::atomic<int> keeper_steps{0};
  std::atomic<uint64_t> reserved{0};
  std::atomic<uint64_t> published{0};
  std::atomic<uint64_t> served{0};
  std::atomic<uint64_t> answers{0};
  std::atomic<uint64_t> answers_beside_changes{0};
};

void StoreTurn(World* world, std::mt19937* random, uint32_t prompt) {
  HostTier& tier = *world->tier;
  const size_t stop = 1 + (*random)() % kDepth;
  const Forked keys(prompt, stop);
  const size_t start = std::min(tier.Match(keys, 0), stop);
  const HostTier::Reserved got = tier.Reserve(keys, start, stop);
  std::vector<uint64_t> sums;
  for (size_t i = 0; i < got.slots.size(); ++i) {
    world->bytes[got.slots[i]] = Mix(keys.At(got.index[i]));
    sums.push_back(world->bytes[got.slots[i]]);
  }
  const size_t n = got.slots.size();
  size_t n_published = 0;  // of the slots: what is given up hangs below it
  if ((*random)() % 8 != 0) {
    while (n_published < n && got.index[n_published] < int{kPublishedDepth}) ++n_published;
  }
  // The rest hangs below the first: nothing of it can be published any more.
  const bool lost = n > 0 && (*random)() % 64 == 0;
  if (lost) tier.Quarantine(got.slots[0], got.generations[0]);
  const size_t n_done =
      tier.Publish(got.slots.data(), got.generations.data(), sums.data(), n_published);
  if (lost) CHECK(n_done == 0);
  world->reserved += n;
  world->published += n_done;
  // I3: a reserved slot is its writer's until it reports, whatever happened to the block.
  CHECK(tier.Abandon(got.slots.data() + n_published, got.generations.data() + n_published,
                     n - n_published) == n - n_published);
}

void LoadTurn(World* world, std::mt19937* random, uint32_t prompt) {
  HostTier& tier = *world->tier;
  const Forked keys(prompt, kDepth);
  const size_t start = (*random)() % 3;
  const HostTier::Acquired got = tier.Acquire(keys, start, kDepth);
  CHECK(got.n <= kPublishedDepth);  // I4
  for (int look = 0; look < 3; ++look) {
    for (size_t i = 0; i < got.slots.size(); ++i) {
      // I3: leased, so these bytes are this block's until the release, whatever else happens.
      CHECK(world->bytes[got.slots[i]] == Mix(keys.At(start + i)));
      CHECK(tier.Checksum(got.slots[i], got.generations[i]) == Mix(keys.At(start + i)));
    }
    if (look == 0 && got.lease != 0) {
      CHECK(tier.Extend(got.lease, keys, kDepth) == LeaseResult::kOk);
    }
    if (look == 1 && !got.slots.empty() && (*random)() % 64 == 0) {
      const size_t i = (*random)() % got.slots.size();
      tier.Quarantine(got.slots[i], got.generations[i]);
      CHECK(tier.Why(keys.At(start + i)) != Fate::kUnknown);
    }
  }
  if (got.lease != 0) CHECK(tier.Release(got.lease));
  world->served += got.slots.size();
}

void WriteAndServe(World* world, uint32_t seed) {
  std::mt19937 random(seed);
  for (int step = 0; step < kSteps; ++step) {
    const int turn = world->turns.fetch_add(1);
    world->turns.notify_all();
    for (int done; turn > kTurnsAKeeperStep * ((done = world->keeper_steps.load()) + kLead);) {
      world->keeper_steps.wait(done);
    }
    const uint32_t prompt = random() % kPrompts;
    if (random() % 2 == 0) {
      StoreTurn(world, &random, prompt);
    } else {
      LoadTurn(world, &random, prompt);
    }
    if (step % 1024 == 0) CHECK(world->tier->CheckIntegrity().empty());
  }
  --world->writers_left;
  world->writers_left.notify_all();
}

// One prompt's life, told in world->story: it grows block by block, and from time to time its end
// or all of it is taken out of matching. A lease on its deepest block keeps eviction away, so
// nothing but what is announced happens to it.
class Keeper {
 public:
  explicit Keeper(World* world) : world_(world), tier_(*world->tier) {}
  ~Keeper() {
    if (lease_ != 0) CHECK(tier_.Release(lease_));
  }

  void Grow() {
    const HostTier::Reserved got = tier_.Reserve(keys_, depth_, depth_ + 1);
    if (got.slots.empty()) return;  // no room
    world_->bytes[got.slots[0]] = Mix(keys_.At(depth_));
    slots_[depth_] = got.slots[0];
    generations_[depth_] = got.generations[0];
    world_->story.Announce(depth_ + 1);
    CHECK(tier_.Publish(&slots_[depth_], &generations_[depth_], &world_->bytes[got.slots[0]], 1) ==
          1);
    Hold(depth_ + 1);
    world_->story.Announce(depth_);  // one less if it was evicted before it was held
    world_->story.Confirm();
    world_->reserved += 1;
    world_->published += 1;
  }
  void Cut(uint32_t to) {
    world_->story.Announce(to);
    CHECK(tier_.Quarantine(slots_[to], generations_[to]) == depth_ - to);
    world_->story.Confirm();
    Hold(to);
    CHECK(depth_ == to);
  }
  void Clear() {
    world_->story.Announce(0);
    tier_.Clear();
    world_->story.Confirm();
    Hold(0);
  }
  uint32_t depth() const { return depth_; }

 private:
  // Leases what is here of the first n blocks, then lets the old lease go.
  void Hold(uint32_t n) {
    const HostTier::Acquired got = tier_.Acquire(keys_, 0, n);
    if (lease_ != 0) CHECK(tier_.Release(lease_));
    lease_ = got.lease;
    depth_ = static_cast<uint32_t>(got.n);
  }

  World* const world_;
  HostTier& tier_;
  const TestChain keys_{kKept, kDepth};
  uint32_t depth_ = 0;
  uint64_t lease_ = 0;
  std::array<int32_t, kDepth> slots_ = {};
  std::array<uint64_t, kDepth> generations_ = {};
};

void Keep(World* world, uint32_t seed) {
  std::mt19937 random(seed);
  Keeper keeper(world);
  for (int step = 0; step < kKeeperSteps; ++step) {
    for (int done; (done = world->turns.load()) < kTurnsAKeeperStep * (step - kLead);) {
      world->turns.wait(done);
    }
    if (random() % 64 == 0) {
      keeper.Clear();
    } else if (keeper.depth() == kDepth || (keeper.depth() > 0 && random() % 16 == 0)) {
      keeper.Cut(random() % keeper.depth());
    } else {
      keeper.Grow();
    }
    ++world->keeper_steps;
    world->keeper_steps.notify_all();
  }
  // Its lease ends with it, and then writers evict what readers were told is there.
  for (int left; (left = world->writers_left.load()) > 0;) world->writers_left.wait(left);
}

void Read(World* world, uint32_t seed) {
  std::mt19937 random(seed);
  const TestChain kept(kKept, kDepth);
  uint64_t answers = 0;
  uint64_t beside = 0;
  while (world->writers_left.load() > 0) {
    const size_t hint = random() % (kDepth + 1);
    const uint32_t from = world->story.confirmed.load(std::memory_order_acquire);
    uint32_t low = 0;
    uint32_t high = kPublishedDepth;
    switch (random() % 4) {
      case 0: {  // I4: of a prompt of which nothing is told, only what was never published
        CHECK(world->tier->Match(Forked(random() % kPrompts, kDepth), hint) <= high);
        break;
      }
      case 1: {
        const uint32_t depth = 1 + random() % kDepth;
        const Fate fate = world->tier->Why(kept.At(depth - 1));
        std::tie(low, high) = world->story.Range(from);
        if (low >= depth) CHECK(fate == Fate::kPublished);
        if (high < depth) CHECK(fate != Fate::kPublished);
        break;
      }
      default: {
        const size_t n = world->tier->Match(kept, hint);
        std::tie(low, high) = world->story.Range(from);
        CHECK(low <= n && n <= high);
        beside += low != high;
      }
    }
    ++answers;
  }
  world->answers += answers;
  world->answers_beside_changes += beside;
}

void LeasedBytesHoldBesideWriters() {
  for (const std::string& order : OrderNames()) {
    World world;
    world.tier = HostTier::Create(kSlots, order, kSlots / 16);
    std::vector<std::thread> threads;
    for (int i = 0; i < kWriters; ++i) threads.emplace_back(WriteAndServe, &world, 10 + i);
    for (int i = 0; i < kReaders; ++i) threads.emplace_back(Read, &world, 20 + i);
    threads.emplace_back(Keep, &world, 30);
    for (std::thread& thread : threads) thread.join();
    const HostTier::Stats stats = world.tier->GetStats();
    std::printf(
        "%s: %llu blocks served, %llu evicted, %llu quarantined, %llu answers, %llu while"
        " the prompt changed\n",
        order.c_str(), static_cast<unsigned long long>(world.served),
        static_cast<unsigned long long>(stats.evictions),
        static_cast<unsigned long long>(stats.quarantined),
        static_cast<unsigned long long>(world.answers),
        static_cast<unsigned long long>(world.answers_beside_changes));
    CHECK(world.served > 0 && stats.evictions > 0 && stats.quarantined > 0 && stats.cleared > 0);
    CHECK(world.answers > 0);
    // Each reserved slot ended once, as its writer was told.
    CHECK(stats.inserts == world.published && stats.abandoned == world.reserved - world.published);
    CHECK(world.tier->CheckIntegrity().empty());
    // Every lease ended and every writer reported: nothing may be left in between.
    CHECK(stats.leases == 0 && stats.leased == 0 && stats.pending == 0);
    CHECK(stats.orphaned == 0 && stats.condemned == 0);
    CHECK(stats.free + stats.published + stats.kept == kSlots && stats.kept <= kSlots / 16);
  }
}

}  // namespace
}  // namespace kvmem

int main() {
  kvmem::EveryDamageIsReported();
  kvmem::LeasedBytesHoldBesideWriters();
}
