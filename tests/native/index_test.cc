// PrefixIndex beside its readers: every answer given while a writer publishes, evicts and clears is
// compared with the depths the prompt had between the call's start and its end.
//
//   cmake -S . -B build/tsan -G Ninja -DKVMEM_PYTHON=OFF -DKVMEM_TESTS=ON -DKVMEM_SANITIZE=thread
//   cmake --build build/tsan && ctest --test-dir build/tsan     (address: ASan with UBSan)
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"
#include "index/prefix_index.h"
#include "index/probe.h"
#include "keys.h"
#include "story.h"

namespace kvmem {

// Asks as a reader does, and lets the test be the writer that overtakes it.
struct PrefixIndexPeer {
  using Point = PrefixIndex::Point;
  template <typename Overtake>
  static BlockState Probe(const PrefixIndex& index, const Key& key, Overtake overtake) {
    return index.ProbeOvertaken(key, PrefixIndex::kAnyDepth, overtake);
  }
  static size_t Home(const PrefixIndex& index, const Key& key) {
    return index.Home(PrefixIndex::Fingerprint(key));
  }
};

namespace {

constexpr uint32_t kPrompts = 24;
constexpr uint32_t kDepth = 40;
constexpr uint32_t kSlots = 400;  // less than half of what the prompts would take
constexpr uint32_t kSteps = 400'000;
constexpr int kReaders = 3;

struct World {
  World() {
    for (uint32_t i = 0; i < kPrompts; ++i) stories.emplace_back(kSteps + 1);
  }
  PrefixIndex index{kSlots};
  std::deque<Story> stories;
  std::atomic<bool> done{false};
  std::atomic<uint64_t> answers{0};
  std::atomic<uint64_t> answers_beside_changes{0};
};

void Read(World* world, uint32_t seed) {
  std::mt19937 random(seed);
  uint64_t answers = 0;
  uint64_t beside = 0;
  while (!world->done.load(std::memory_order_relaxed)) {
    const uint32_t prompt = random() % kPrompts;
    Story& story = world->stories[prompt];
    const TestChain keys(prompt, kDepth);
    const uint32_t from = story.confirmed.load(std::memory_order_acquire);
    if (random() % 4 != 0) {
      const size_t n = world->index.Match(keys, kDepth, random() % (kDepth + 1));
      const auto [low, high] = story.Range(from);
      CHECK(low <= n && n <= high);
      beside += low != high;
    } else {
      const uint32_t depth = 1 + random() % kDepth;
      const BlockState state = world->index.StateOf(keys.At(depth - 1));
      const auto [low, high] = story.Range(from);
      if (low >= depth) CHECK(state == BlockState::kPublished);
      if (high < depth) CHECK(state != BlockState::kPublished);
      beside += low != high;
    }
    ++answers;
  }
  world->answers += answers;
  world->answers_beside_changes += beside;
}

// Publishes at and evicts from the ends of random prompts, now and then clears.
void Write(World* world, uint32_t seed) {
  PrefixIndex& index = world->index;
  std::mt19937 random(seed);
  std::vector<std::vector<SlotId>> chain(kPrompts);
  std::vector<SlotId> free;
  for (SlotId slot = 0; slot < kSlots; ++slot) free.push_back(slot);
  for (uint32_t step = 0; step < kSteps; ++step) {
    const uint32_t prompt = random() % kPrompts;
    Story& story = world->stories[prompt];
    std::vector<SlotId>& blocks = chain[prompt];
    const uint32_t depth = static_cast<uint32_t>(blocks.size());
    if (random() % 8192 == 0) {
      for (Story& each : world->stories) each.Announce(0);
      index.DetachAll();
      for (Story& each : world->stories) each.Confirm();
      for (std::vector<SlotId>& all : chain) {
        for (size_t i = all.size(); i-- > 0;) {
          index.Free(all[i]);
          free.push_back(all[i]);
        }
        all.clear();
      }
    } else if (random() % 2 == 0 && depth < kDepth && !free.empty()) {
      const SlotId slot = free.back();
      free.pop_back();
      index.Add(slot, TestKey(prompt, depth + 1), depth == 0 ? kNoSlot : blocks.back());
      story.Announce(depth + 1);
      index.Publish(slot, 0, kTierHost);
      story.Confirm();
      blocks.push_back(slot);
    } else if (depth > 0) {
      story.Announce(depth - 1);
      index.Free(blocks.back());
      story.Confirm();
      free.push_back(blocks.back());
      blocks.pop_back();
    }
    if (step % 8192 == 0) {
      std::vector<std::string> faults;
      index.Check(&faults);
      for (const std::string& fault : faults) std::fprintf(stderr, "%s\n", fault.c_str());
      CHECK(faults.empty());
    }
  }
  world->done = true;
}

void ReadersSeeOnlyWhatWas() {
  const auto world = std::make_unique<World>();
  std::vector<std::thread> readers;
  for (int i = 0; i < kReaders; ++i) readers.emplace_back(Read, world.get(), 100 + i);
  Write(world.get(), 7);
  for (std::thread& reader : readers) reader.join();
  std::printf("%llu answers, %llu while the prompt changed\n",
              static_cast<unsigned long long>(world->answers),
              static_cast<unsigned long long>(world->answers_beside_changes));
  CHECK(world->answers_beside_changes > 0);
}

// Two keys that differ in one word only and have the same fingerprint: the whole key must decide.
std::pair<Key, Key> Lookalikes(int word) {
  std::unordered_map<uint32_t, Key> seen;
  Key key = TestKey(1, 1);
  for (;; ++key.word[word]) {
    const auto [at, fresh] = seen.emplace(static_cast<uint32_t>(Mix(key) >> 32), key);
    if (!fresh) return {at->second, key};
  }
}

void KeysOfOneFingerprintAreApart() {
  for (int word = 0; word < 4; ++word) {
    const auto [here, absent] = Lookalikes(word);
    PrefixIndex index(4);
    index.Add(0, here, kNoSlot);
    index.Publish(0, 0, kTierHost);
    CHECK(index.StateOf(here) == BlockState::kPublished);
    CHECK(index.StateOf(absent) == BlockState::kFree);
    CHECK(index.Find(absent) == kNoSlot);
  }
}

// A reader has read the tag of another block, published in the slot meanwhile, when the slot goes
// back to the key that is asked for and is only pending (I1, I4).
void AReaderNeverMixesTwoOwners() {
  PrefixIndex index(4);
  const Key asked = TestKey(1, 1);
  index.Add(0, asked, kNoSlot);
  int overtaken = 0;
  const BlockState state = PrefixIndexPeer::Probe(index, asked, [&](PrefixIndexPeer::Point point) {
    if (point == PrefixIndexPeer::Point::kAtCell && overtaken == 0) {
      index.Free(0);
      index.Add(0, TestKey(2, 1), kNoSlot);
      index.Publish(0, 0, kTierHost);
      ++overtaken;
    } else if (point == PrefixIndexPeer::Point::kAfterTag && overtaken == 1) {
      index.Free(0);
      index.Add(0, asked, kNoSlot);
      ++overtaken;
    }
  });
  CHECK(overtaken == 2);
  CHECK(state != BlockState::kPublished);
}

// An entry is moved from ahead of a reader to behind it.
void AReaderNeverMissesAnEntryThatMoves() {
  constexpr uint32_t n = 16;
  int n_moved = 0;
  for (uint64_t round = 0; round < 200; ++round) {
    PrefixIndex index(n);
    for (SlotId slot = 0; slot < n; ++slot) {
      index.Add(slot, TestKey(round * n + slot, 1), kNoSlot);
      index.Publish(slot, 0, kTierHost);
    }
    // Every entry that shares the cluster of `last` and stands before it is removed in turn, while
    // a reader on its way to `last` has passed it.
    const Key last = TestKey(round * n + n - 1, 1);
    SlotId next = 0;
    const BlockState state = PrefixIndexPeer::Probe(index, last, [&](PrefixIndexPeer::Point point) {
      if (point != PrefixIndexPeer::Point::kAfterCell || next + 1 >= n) return;
      while (next + 1 < n &&
             PrefixIndexPeer::Home(index, index.key(next)) != PrefixIndexPeer::Home(index, last)) {
        ++next;
      }
      if (next + 1 >= n) return;
      index.Free(next++);
      ++n_moved;
    });
    CHECK(state == BlockState::kPublished);
  }
  CHECK(n_moved > 0);
}

// A reader that began before everything is cleared finds nothing once it has seen the new epoch.
void AClearedBlockIsNotSeenAgain() {
  PrefixIndex index(4);
  index.Add(0, TestKey(1, 1), kNoSlot);
  index.Publish(0, 0, kTierHost);
  const BlockState state = PrefixIndexPeer::Probe(
      index, TestKey(1, 1), [&, done = false](PrefixIndexPeer::Point point) mutable {
        if (point != PrefixIndexPeer::Point::kAtCell || std::exchange(done, true)) return;
        index.DetachAll();
      });
  CHECK(state == BlockState::kFree);
  CHECK(index.StateOf(TestKey(1, 1)) == BlockState::kFree);
}

void AKeyAtAnotherDepthIsNoMatch() {
  PrefixIndex index(8);
  index.Add(0, TestKey(1, 1), kNoSlot);
  index.Publish(0, 0, kTierHost);
  index.Add(1, TestKey(1, 2), 0);
  index.Publish(1, 0, kTierHost);
  Key shuffled[2] = {TestKey(1, 2), TestKey(1, 1)};
  CHECK(index.Match(PackedKeys(shuffled, 2), 2, 0) == 0);
  Key straight[2] = {TestKey(1, 1), TestKey(1, 2)};
  CHECK(index.Match(PackedKeys(straight, 2), 2, 0) == 2);
}

// Fills the table to its last slot and empties it in random order, many times over.
void ErasingNeverLosesAnother() {
  constexpr uint32_t n = 512;
  PrefixIndex index(n);
  std::mt19937 random(3);
  for (int round = 0; round < 40; ++round) {
    std::vector<SlotId> order;
    for (SlotId slot = 0; slot < n; ++slot) {
      index.Add(slot, TestKey(round * 1000 + slot, 1), kNoSlot);
      order.push_back(slot);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (size_t i = 0; i < order.size(); ++i) {
      index.Free(order[i]);
      if (i % 64 != 0) continue;
      std::vector<std::string> faults;
      index.Check(&faults);
      CHECK(faults.empty());
    }
  }
}

// Clearing takes a while; to readers it is one instant. A reader that has seen the first entry of
// the table go must not see the last one any more. Runs until a reader was there often enough.
void ClearingIsOneInstant() {
  constexpr uint32_t kLargeEnoughToTakeAWhile = 100'000;
  constexpr int kOften = 50;
  PrefixIndex index(kLargeEnoughToTakeAWhile);
  Key first = TestKey(0, 1);
  Key last = first;
  for (uint64_t prompt = 1; prompt < 100; ++prompt) {
    const Key key = TestKey(prompt, 1);
    if (PrefixIndexPeer::Home(index, key) < PrefixIndexPeer::Home(index, first)) first = key;
    if (PrefixIndexPeer::Home(index, key) > PrefixIndexPeer::Home(index, last)) last = key;
  }
  std::atomic<uint64_t> stage{0};  // odd: published, and then being cleared
  std::atomic<int> seen{0};
  std::thread reader([&] {
    while (seen.load() < kOften) {
      const uint64_t before = stage.load(std::memory_order_acquire);
      if (before % 2 == 0 || index.StateOf(first) == BlockState::kPublished) continue;
      const BlockState state = index.StateOf(last);
      if (stage.load(std::memory_order_acquire) != before) continue;
      CHECK(state != BlockState::kPublished);
      ++seen;
    }
  });
  while (seen.load() < kOften) {
    index.Add(0, first, kNoSlot);
    index.Publish(0, 0, kTierHost);
    index.Add(1, last, kNoSlot);
    index.Publish(1, 0, kTierHost);
    stage.fetch_add(1, std::memory_order_release);
    index.DetachAll();
    stage.fetch_add(1, std::memory_order_release);
    index.Free(0);
    index.Free(1);
  }
  reader.join();
}

// A small table, nearly full: entries that stay are moved by almost every removal of another, and
// readers that walk meanwhile must not miss them.
void KeysThatStayAreNeverMissed() {
  constexpr uint32_t kStay = 8;
  constexpr uint32_t kChurn = 8;
  constexpr uint32_t kRounds = 400'000;
  PrefixIndex index(kStay + kChurn);
  const auto add = [&](SlotId slot, uint64_t prompt) {
    index.Add(slot, TestKey(prompt, 1), kNoSlot);
    index.Publish(slot, 0, kTierHost);
  };
  for (SlotId slot = 0; slot < kStay + kChurn; ++slot) add(slot, slot);
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  for (int i = 0; i < kReaders; ++i) {
    readers.emplace_back([&] {
      while (!done.load(std::memory_order_relaxed)) {
        for (uint64_t prompt = 0; prompt < kStay; ++prompt) {
          CHECK(index.StateOf(TestKey(prompt, 1)) == BlockState::kPublished);
        }
      }
    });
  }
  std::mt19937 random(11);
  for (uint32_t round = 0; round < kRounds; ++round) {
    const SlotId slot = kStay + random() % kChurn;
    index.Free(slot);
    add(slot, 1000 + random() % 100'000 * kChurn + slot);
  }
  done = true;
  for (std::thread& reader : readers) reader.join();
}

}  // namespace
}  // namespace kvmem

int main() {
  kvmem::KeysThatStayAreNeverMissed();
  kvmem::ClearingIsOneInstant();
  kvmem::KeysOfOneFingerprintAreApart();
  kvmem::AReaderNeverMixesTwoOwners();
  kvmem::AReaderNeverMissesAnEntryThatMoves();
  kvmem::AClearedBlockIsNotSeenAgain();
  kvmem::AKeyAtAnotherDepthIsNoMatch();
  kvmem::ErasingNeverLosesAnother();
  kvmem::ReadersSeeOnlyWhatWas();
}
