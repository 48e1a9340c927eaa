// The disk store: what comes back is what went down, whatever was done to the files meanwhile; and
// several threads of moves at once.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "arena_bytes.h"
#include "check.h"
#include "disk/disk_store.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

constexpr uint64_t kShare = 5000;
constexpr uint64_t kSlots = 24;
constexpr unsigned char kNameSpace[kKeyBytes] = {7, 7, 7};

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "kvmem-disk-XXXXXX").string();
    CHECK(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { std::filesystem::remove_all(path); }
  std::string path;
};

void KeyOf(uint64_t i, unsigned char* key) {
  std::memset(key, 0, kKeyBytes);
  const uint64_t words[2] = {i + 1, Xxh3_64(&i, sizeof i)};
  std::memcpy(key, words, sizeof words);
}

unsigned char ByteOf(uint64_t i, uint32_t rank, uint64_t at) {
  return static_cast<unsigned char>(i * 37 + rank * 101 + at * 5 + (at >> 7));
}

struct Bench {
  explicit Bench(const std::string& folder, uint32_t n_ranks = 1, const std::string& faults = "",
                 uint64_t disk_bytes = 4 << 20, size_t queue = 256, bool codec = false)
      : arena(kSlots, kShare, n_ranks) {
    for (uint32_t rank = 0; rank < n_ranks; ++rank) tables.push_back(arena.table(rank));
    options.folder = folder;
    options.disk_bytes = disk_bytes;
    options.faults = faults;
    options.queue = queue;
    options.codec = codec;
    store = DiskStore::Open(options, tables, kNameSpace, &status, &error);
  }

  // Opened again, with what is there.
  void Recover() {
    DiskRecovered found;
    CHECK(store->Recovered(&found) == 0);
  }

  // Block i in an arena slot, as a worker stores it.
  void Fill(uint64_t i, uint64_t slot, uint64_t generation, uint32_t group = 0) {
    unsigned char key[kKeyBytes];
    KeyOf(i, key);
    for (uint32_t rank = 0; rank < tables.size(); ++rank) {
      CHECK(tables[rank].Claim(slot, generation));
      auto* const data = reinterpret_cast<unsigned char*>(tables[rank].Data(slot));
      for (uint64_t at = 0; at < kShare; ++at) data[at] = ByteOf(i, rank, at);
      const Identity identity = {group, kShare, reinterpret_cast<const std::byte*>(key)};
      CHECK(tables[rank].Complete(slot, generation, identity, Xxh3_64(data, kShare)));
    }
  }

  bool Holds(uint64_t i, uint64_t slot, uint64_t generation) {
    for (uint32_t rank = 0; rank < tables.size(); ++rank) {
      if (!tables[rank].IsComplete(slot, generation)) return false;
      const auto* const data = reinterpret_cast<const unsigned char*>(tables[rank].Data(slot));
      for (uint64_t at = 0; at < kShare; ++at) {
        if (data[at] != ByteOf(i, rank, at)) return false;
      }
    }
    return true;
  }

  DiskMove Move(uint64_t i, uint64_t slot, uint64_t slot_generation, uint64_t record,
                uint64_t record_generation) {
    DiskMove move = {};
    move.ticket = ++tickets;
    move.slot = slot;
    move.slot_generation = slot_generation;
    move.record = record;
    move.record_generation = record_generation;
    KeyOf(i, move.key);
    if (i > 0) KeyOf(i - 1, move.parent);
    return move;
  }

  DiskMoved Wait() {
    for (int turn = 0; turn < 1000; ++turn) {
      for (const DiskMoved& moved : store->Poll()) return moved;
      store->Wait(1.0);
    }
    CHECK(false);
    return {};
  }
  DiskMoved Write(const DiskMove& move) {
    CHECK(store->Write(move));
    return Wait();
  }
  DiskMoved Read(const DiskMove& move) {
    CHECK(store->Read(move));
    return Wait();
  }

  TestArena arena;
  std::vector<SlotTable> tables;
  DiskOptions options;
  DiskOpen status = DiskOpen::kError;
  std::string error;
  std::unique_ptr<DiskStore> store;
  uint64_t tickets = 0;
};

void TestRoundTripAndRestart() {
  for (const uint32_t n_ranks : {1u, 3u}) {
    Folder folder;
    uint64_t checksum = 0;
    {
      Bench bench(folder.path, n_ranks);
      CHECK(bench.status == DiskOpen::kOk);
      for (uint64_t i = 0; i < 6; ++i) {
        bench.Fill(i, i, 1);
        const DiskMoved moved = bench.Write(bench.Move(i, i, 1, i + 2, 5));
        CHECK(moved.status == DiskStatus::kOk && moved.bytes > 0);
        checksum = moved.checksum;
      }
      const DiskMoved back = bench.Read(bench.Move(5, 20, 1, 7, 5));
      CHECK(back.status == DiskStatus::kOk && back.checksum == checksum);
      CHECK(bench.Holds(5, 20, 1));
      CHECK(bench.store->Drop(2) == 0);
      CHECK(bench.store->Flush() == 0);
    }
    Bench bench(folder.path, n_ranks);
    DiskRecovered found;
    CHECK(bench.store->Recovered(&found) == 0);
    CHECK((found.records == std::vector<int32_t>{3, 4, 5, 6, 7}));
    CHECK(found.generations == std::vector<uint64_t>(5, 5));
    CHECK(found.checksums.back() == checksum);
    CHECK(bench.Read(bench.Move(3, 0, 9, 5, 5)).status == DiskStatus::kOk);
    CHECK(bench.Holds(3, 0, 9));
    // The next write is later than all that was there.
    bench.Fill(8, 1, 1);
    CHECK(bench.Write(bench.Move(8, 1, 1, 2, 1)).status == DiskStatus::kOk);
    CHECK(bench.store->used_bytes() == 6 * DiskSlotBytes(n_ranks * kShare));
    CHECK(bench.store->Clear() == 0);
    CHECK(bench.store->used_bytes() == 0);
    bench.store.reset();
    Bench again(folder.path, n_ranks);
    DiskRecovered none;
    CHECK(again.store->Recovered(&none) == 0 && none.records.empty());
  }
}

void TestWhatIsNotTheBlockIsNotServed() {
  Folder folder;
  Bench bench(folder.path);
  bench.Fill(0, 0, 1);
  CHECK(bench.Write(bench.Move(0, 0, 1, 4, 3)).status == DiskStatus::kOk);
  CHECK(bench.Read(bench.Move(1, 9, 1, 4, 3)).status == DiskStatus::kRecord);  // another key
  CHECK(bench.Read(bench.Move(0, 9, 1, 4, 2)).status == DiskStatus::kRecord);  // another generation
  CHECK(bench.Read(bench.Move(0, 9, 1, 5, 3)).status == DiskStatus::kRecord);  // never written
  DiskMove other_group = bench.Move(0, 9, 1, 4, 3);
  other_group.group = 1;
  CHECK(bench.Read(other_group).status == DiskStatus::kRecord);
  CHECK(!bench.tables[0].IsComplete(9, 1));
  // The arena's slot has moved on, or is another block's.
  bench.Fill(7, 9, 5);
  CHECK(bench.Read(bench.Move(0, 9, 1, 4, 3)).status == DiskStatus::kSource);
  CHECK(bench.Holds(7, 9, 5));
  CHECK(bench.Write(bench.Move(0, 9, 5, 6, 1)).status == DiskStatus::kSource);
  CHECK(bench.Write(bench.Move(7, 9, 4, 6, 1)).status == DiskStatus::kSource);
  // Bytes that changed in the arena since their checksum was taken.
  bench.tables[0].Data(9)[17] ^= std::byte{1};
  CHECK(bench.Write(bench.Move(7, 9, 5, 6, 1)).status == DiskStatus::kSource);
}

void TestAnEmptiedRecordComesBeforeItsNewBlock() {
  Folder folder;
  {
    Bench bench(folder.path, 1, "fail:write:28:6");
    bench.Fill(0, 0, 1);
    bench.Fill(1, 1, 1);
    // A header, then three writes a block: the sixth is the second block's slot.
    CHECK(bench.Write(bench.Move(0, 0, 1, 0, 1)).status == DiskStatus::kOk);
    const DiskMoved moved = bench.Write(bench.Move(1, 1, 1, 0, 2));
    CHECK(moved.status == DiskStatus::kError && moved.error == ENOSPC);
  }
  Bench bench(folder.path);
  DiskRecovered found;
  CHECK(bench.store->Recovered(&found) == 0 && found.records.empty());
}

void TestErrorsAreTold() {
  Folder folder;
  Bench bench(folder.path, 1, "fail:read:5:1");  // the header was not there to be read
  bench.Fill(0, 0, 1);
  CHECK(bench.Write(bench.Move(0, 0, 1, 0, 1)).status == DiskStatus::kOk);
  const DiskMoved moved = bench.Read(bench.Move(0, 5, 1, 0, 1));
  CHECK(moved.status == DiskStatus::kError && moved.error == EIO);
  DiskRecovered found;
  CHECK(bench.store->Recovered(&found) == EIO);
  std::string error;
  for (const char* spec : {"", "kill", "kill:nowhere:1", "fail:write:0:1", "fail:write:28:x",
                           "tear:1", "sleep:1:1", "kill:after_data:1,"}) {
    CHECK(FaultyDiskIo(spec, &error) == nullptr);
  }
}

void TestWhoOpens() {
  Folder folder;
  Bench first(folder.path);
  CHECK(first.status == DiskOpen::kOk);
  CHECK(Bench(folder.path).status == DiskOpen::kBusy);
  first.store.reset();
  CHECK(Bench(folder.path, 2).status == DiskOpen::kOther);
  CHECK(Bench(folder.path, 1, "", 9000).status == DiskOpen::kNoRoom);
  CHECK(Bench(folder.path + "/none").status == DiskOpen::kError);
  CHECK(Bench(folder.path, 1, "nonsense").status == DiskOpen::kError);
  struct stat about;
  for (const char* name : {"/lock", "/table.kvd", "/data.kvd"}) {
    CHECK(stat((folder.path + name).c_str(), &about) == 0 && (about.st_mode & 0777) == 0600);
  }
  std::filesystem::resize_file(folder.path + "/table.kvd", 100);
  CHECK(Bench(folder.path).status == DiskOpen::kDamaged);
}

void TestTheQueueHasABound() {
  Folder folder;
  Bench bench(folder.path, 1, "", 4 << 20, 1);
  size_t n_refused = 0;
  for (uint64_t i = 0; i < kSlots; ++i) bench.Fill(i, i, 1);
  for (uint64_t turn = 0; turn < 200; ++turn) {
    n_refused += !bench.store->Write(bench.Move(turn % kSlots, turn % kSlots, 1, turn, 1));
  }
  CHECK(n_refused > 0);
}

// Every kind of damage, anywhere: a read fails or gives the block.
void TestDamageIsNeverServed() {
  std::mt19937_64 draw(20261126);
  uint64_t n_found = 0;
  for (int round = 0; round < 60; ++round) {
    Folder folder;
    constexpr uint64_t kBlocks = 8;
    {
      Bench bench(folder.path);
      for (uint64_t i = 0; i < kBlocks; ++i) {
        bench.Fill(i, i, 1);
        CHECK(bench.Write(bench.Move(i, i, 1, i, 1)).status == DiskStatus::kOk);
      }
    }
    const uint64_t slot_bytes = DiskSlotBytes(kShare);
    const bool in_table = round % 2 == 0;
    const std::string path = folder.path + (in_table ? "/table.kvd" : "/data.kvd");
    const uint64_t from = in_table ? sizeof(DiskHeader) : 0;
    const uint64_t bytes = kBlocks * (in_table ? sizeof(DiskRecord) : slot_bytes);
    if (round % 10 >= 8) {
      std::filesystem::resize_file(path, from + draw() % bytes);
    } else {
      std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
      const uint64_t n = round % 10 < 4 ? 1 : 512;
      const uint64_t at = from + draw() % (bytes - n);
      std::vector<char> some(n);
      file.seekg(static_cast<std::streamoff>(at))
          .read(some.data(), static_cast<std::streamsize>(n));
      for (char& byte : some) byte = n == 1 ? static_cast<char>(byte ^ (1 << draw() % 8)) : char{0};
      file.seekp(static_cast<std::streamoff>(at))
          .write(some.data(), static_cast<std::streamsize>(n));
    }
    Bench bench(folder.path);
    CHECK(bench.status == DiskOpen::kOk);
    DiskRecovered found;
    CHECK(bench.store->Recovered(&found) == 0);
    for (size_t k = 0; k < found.records.size(); ++k) {
      const auto i = static_cast<uint64_t>(found.records[k]);
      unsigned char key[kKeyBytes];
      KeyOf(i, key);
      CHECK(std::memcmp(key, found.keys.data() + k * kKeyBytes, kKeyBytes) == 0);
      const DiskMoved moved = bench.Read(bench.Move(i, i, 1, i, found.generations[k]));
      if (moved.status == DiskStatus::kOk) CHECK(bench.Holds(i, i, 1));
      n_found += moved.status != DiskStatus::kOk;
    }
    n_found += kBlocks - found.records.size();
  }
  CHECK(n_found >= 50);  // padding may be hit, and hurts nobody
}

// Writers and readers of different records at once; under TSan and ASan.
void TestManyMovesAtOnce() {
  Folder folder;
  Bench bench(folder.path, 2);
  for (uint64_t i = 0; i < kSlots / 2; ++i) {
    bench.Fill(i, i, 1);
    CHECK(bench.Write(bench.Move(i, i, 1, i, 1)).status == DiskStatus::kOk);
  }
  for (uint64_t turn = 0; turn < 8; ++turn) {
    std::set<uint64_t> open;
    for (uint64_t i = 0; i < kSlots / 2; ++i) {
      DiskMove up = bench.Move(i, kSlots / 2 + i, turn + 1, i, 1);
      DiskMove down = bench.Move(i, i, 1, 100 + i, turn + 1);
      open.insert(up.ticket);
      open.insert(down.ticket);
      CHECK(bench.store->Read(up) && bench.store->Write(down));
    }
    while (!open.empty()) {
      bench.store->Wait(1.0);
      for (const DiskMoved& moved : bench.store->Poll()) {
        CHECK(moved.status == DiskStatus::kOk && open.erase(moved.ticket) == 1);
      }
    }
    for (uint64_t i = 0; i < kSlots / 2; ++i) CHECK(bench.Holds(i, kSlots / 2 + i, turn + 1));
  }
}

// Every choice against a plain list of units.
void TestSpaceIsNobodysTwice() {
  std::mt19937_64 draw(7);
  for (const uint64_t n_units : {1u, 63u, 64u, 65u, 300u}) {
    DiskSpace space(n_units);
    std::vector<char> taken(n_units);
    std::vector<std::pair<uint64_t, uint32_t>> runs;
    const auto mark = [&](uint64_t place, uint32_t n, char how) {
      for (uint64_t unit = place; unit < place + n; ++unit) {
        CHECK(unit < n_units && taken[unit] != how);
        taken[unit] = how;
      }
    };
    for (int turn = 0; turn < 4000; ++turn) {
      const auto n = static_cast<uint32_t>(1 + draw() % 9);
      if (draw() % 2 == 0) {
        const uint64_t place = space.Take(n);
        if (place != DiskSpace::kNone) {
          mark(place, n, 1);
          runs.emplace_back(place, n);
        } else {
          uint64_t run = 0, longest = 0;
          for (const char one : taken) longest = std::max(longest, run = one ? 0 : run + 1);
          CHECK(longest < n);
        }
      } else if (!runs.empty()) {
        std::swap(runs[draw() % runs.size()], runs.back());
        mark(runs.back().first, runs.back().second, 0);
        space.Free(runs.back().first, runs.back().second);
        runs.pop_back();
      }
      CHECK(space.n_taken() ==
            static_cast<uint64_t>(std::count(taken.begin(), taken.end(), char{1})));
    }
    if (!runs.empty()) CHECK(!space.TakeAt(runs[0].first, 1));
  }
}

// As near to keys and values as matters here: elements around 1, all mantissas alike likely.
std::vector<std::byte> Numbers(size_t n, uint32_t width) {
  std::mt19937 draw(11);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  std::vector<std::byte> bytes(n * width);
  for (size_t i = 0; i < n; ++i) {
    const float value = normal(draw);
    std::byte raw[sizeof value];
    std::memcpy(raw, &value, sizeof value);
    std::memcpy(&bytes[i * width], raw + sizeof value - width, width);
  }
  return bytes;
}

void TestCodecs() {
  if (!DiskCodec::Available()) {
    std::puts("no libzstd.so.1: codecs are not tested");
    return;
  }
  DiskCodec codec;
  for (const uint32_t width : {2u, 4u}) {
    const std::vector<std::byte> plain = Numbers(9000, width);
    std::vector<std::byte> stored(plain.size()), back(plain.size());
    const size_t n = codec.Encode(width, plain.data(), plain.size(), stored.data(), stored.size());
    CHECK(n > 0 && n < plain.size());
    CHECK(codec.Decode(width, stored.data(), n, back.data(), back.size()) && back == plain);
    CHECK(codec.Encode(width, plain.data(), plain.size(), stored.data(), n - 1) == 0);
    CHECK(codec.Encode(width, plain.data(), plain.size() - 1, stored.data(), stored.size()) == 0);
    // What is no encoding is no block, and nothing is written beyond it.
    CHECK(codec.Encode(width, plain.data(), plain.size(), stored.data(), stored.size()) == n);
    std::mt19937 draw(5);
    for (int turn = 0; turn < 500; ++turn) {
      std::vector<std::byte> damaged(stored.begin(), stored.begin() + static_cast<long>(n));
      damaged[draw() % damaged.size()] ^= static_cast<std::byte>(1 + draw() % 255);
      if (turn % 3 == 0) damaged.resize(draw() % damaged.size());
      if (turn % 5 == 0 && damaged.size() >= 4) std::memset(damaged.data(), 0xff, 4);
      const bool decoded =
          codec.Decode(width, damaged.data(), damaged.size(), back.data(), back.size());
      CHECK(!decoded || damaged.size() == n);
    }
    CHECK(!codec.Decode(3, stored.data(), n, back.data(), back.size()));
  }
  std::vector<std::byte> noise(8192), stored(8192);
  std::mt19937 draw(3);
  for (std::byte& byte : noise) byte = static_cast<std::byte>(draw());
  CHECK(codec.Encode(2, noise.data(), noise.size(), stored.data(), stored.size()) == 0);
}

// The element as a double, of codec 8 (bf16), 9 (fp16) or 10 (float32).
double Element(uint32_t codec, const std::byte* from) {
  if (codec == 10) {
    float value = 0;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  uint16_t bits = 0;
  std::memcpy(&bits, from, sizeof bits);
  if (codec == 8) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value = 0;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = (bits >> 10) & 31;
  const double fraction = bits & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// Finite numbers of many sizes, and groups of zeros.
std::vector<std::byte> Finite(size_t n, uint32_t codec) {
  const size_t width = codec == 10 ? 4 : 2;
  std::vector<std::byte> bytes(n * width);
  std::mt19937 draw(codec);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < n; ++i) {
    const float size = std::ldexp(1.0F, static_cast<int>(i / 64 % 19) - 12);
    const float value = i / 64 % 7 == 3 ? 0.0F : normal(draw) * size;
    uint32_t raw = 0;
    std::memcpy(&raw, &value, sizeof raw);
    if (codec == 8) raw >>= 16;
    if (codec == 9) {  // any finite bits, of exponents like those
      raw = value == 0 ? 0 : (draw() & 0x83ff) | static_cast<uint32_t>(i / 64 % 19 + i % 3) << 10;
    }
    std::memcpy(&bytes[i * width], &raw, width);
  }
  return bytes;
}

// Every element is within half a step, and half of what the element's own kind can tell apart.
void TestInt8IsNear() {
  DiskCodec codec;
  for (const uint32_t how : {8u, 9u, 10u}) {
    const size_t width = how == 10 ? 4 : 2;
    for (const size_t n : {size_t{1}, size_t{63}, size_t{64}, size_t{4000}}) {
      const std::vector<std::byte> plain = Finite(n, how);
      const size_t length = n + 2 * ((n + 63) / 64);
      std::vector<std::byte> stored(n * width + 2), back(n * width + 1, std::byte{0x5a});
      CHECK(codec.Encode(how, plain.data(), n * width, stored.data(), stored.size()) == length);
      CHECK(codec.Encode(how, plain.data(), n * width, stored.data(), length - 1) == 0);
      CHECK(codec.Encode(how, plain.data(), n * width - 1, stored.data(), stored.size()) == 0);
      CHECK(codec.Decode(how, stored.data(), length, back.data(), n * width));
      CHECK(back.back() == std::byte{0x5a});
      CHECK(!codec.Decode(how, stored.data(), length - 1, back.data(), n * width));
      CHECK(!codec.Decode(how, stored.data(), length, back.data(), n * width + width));
      const double own = how == 8 ? 0x1p-8 : how == 9 ? 0x1p-11 : 0x1p-24;
      for (size_t i = 0; i < n; ++i) {
        double largest = 0;
        for (size_t j = i / 64 * 64; j < std::min(n, i / 64 * 64 + 64); ++j) {
          largest = std::max(largest, std::abs(Element(how, &plain[j * width])));
        }
        const double was = Element(how, &plain[i * width]), is = Element(how, &back[i * width]);
        const double most = largest / 127 * 1.008 / 2 + std::abs(is) * own + 0x1p-25;
        if (!(std::abs(was - is) <= most)) {
          std::printf("%u: %zu of %zu was %g, is %g, largest %g\n", how, i, n, was, is, largest);
          CHECK(false);
        }
      }
    }
    // No number, no block: it is stored exactly then.
    std::vector<std::byte> plain = Finite(200, how), stored(plain.size() + 8);
    const std::array<uint32_t, 3> no_number = {0x7f80, 0x7c00, 0x7f800000};
    std::memcpy(&plain[100 * width], &no_number[how - 8], width);
    CHECK(codec.Encode(how, plain.data(), plain.size(), stored.data(), stored.size()) == 0);
  }
}

// An approximate block is what was decoded: all checksums are of that, on both ways and later.
void TestAnApproximateBlockIsWhole() {
  for (const uint32_t n_ranks : {1u, 3u}) {
    Folder folder;
    const std::vector<std::byte> plain = Finite(kShare / 2, 8);
    {
      Bench bench(folder.path, n_ranks);
      bench.Fill(1, 1, 1);
      for (const SlotTable& table : bench.tables) {
        CHECK(table.Claim(0, 1));
        std::memset(table.Data(0), 0, kShare);
        std::memcpy(table.Data(0), plain.data(), plain.size());
        unsigned char key[kKeyBytes];
        KeyOf(0, key);
        const Identity identity = {0, kShare, reinterpret_cast<const std::byte*>(key)};
        CHECK(table.Complete(0, 1, identity, Xxh3_64(table.Data(0), kShare)));
      }
      DiskMove down = bench.Move(0, 0, 1, 0, 1);
      down.codec = 8;
      const DiskMoved written = bench.Write(down);
      CHECK(written.status == DiskStatus::kOk);
      CHECK(written.bytes ==
            DiskSlotBytes(n_ranks * kShare / 2 + 2 * ((n_ranks * kShare / 2 + 63) / 64)));
      const DiskMoved read = bench.Read(bench.Move(0, 5, 1, 0, 1));
      CHECK(read.status == DiskStatus::kOk && read.checksum == written.checksum);
      for (const SlotTable& table : bench.tables) {
        CHECK(table.IsComplete(5, 1));
        CHECK(table.Descriptor(5).checksum.load() == Xxh3_64(table.Data(5), kShare));
        CHECK(std::memcmp(table.Data(5), table.Data(0), kShare) != 0);
      }
      // What would not pay, or is no number, is stored exactly.
      DiskMove bytes = bench.Move(1, 1, 1, 1, 1);
      bytes.codec = 10;
      CHECK(bench.Write(bytes).status == DiskStatus::kOk);
      CHECK(bench.Read(bench.Move(1, 6, 1, 1, 1)).status == DiskStatus::kOk);
      CHECK(bench.Holds(1, 6, 1));
    }
    Bench bench(folder.path, n_ranks);
    bench.Recover();
    CHECK(bench.Read(bench.Move(0, 7, 1, 0, 1)).status == DiskStatus::kOk);
  }
}

void TestACodecIsChosenByWhatItSaves() {
  CodecChoice choice;
  const auto measure = [&](uint32_t group, uint64_t raw, uint64_t two, uint64_t four) {
    for (int i = 0; i < CodecChoice::kSamples; ++i) {
      CHECK(choice.Of(group) == CodecChoice::kMeasure);
      choice.Saw(group, raw, two, four);
    }
    return choice.Of(group);
  };
  CHECK(measure(0, 32, 24, 28) == 2);
  CHECK(measure(1, 32, 30, 27) == 4);
  CHECK(measure(2, 32, 31, 31) == 0);  // less than a sixteenth
  CHECK(measure(3, 32, 30, 32) == 2);  // a sixteenth
  for (uint64_t i = 1; i < CodecChoice::kAgain; ++i) choice.Of(2);
  CHECK(measure(2, 32, 20, 32) == 2);  // what it holds may have changed
  CHECK(choice.Of(0) == 2);
}

// Blocks stored shorter take less of the budget, and come back as they were.
void TestShorterBlocksLeaveRoom() {
  if (!DiskCodec::Available()) return;
  Folder folder;
  uint64_t used = 0;
  {
    Bench bench(folder.path, 1, "", 4 << 20, 256, true);
    const uint64_t room = bench.store->Room();
    for (uint64_t i = 0; i < 20; ++i) {
      bench.Fill(i, i, 1);
      CHECK(bench.Write(bench.Move(i, i, 1, i, 1)).status == DiskStatus::kOk);
    }
    used = bench.store->used_bytes();
    CHECK(used < 20 * bench.store->slot_bytes());
    CHECK(bench.store->Room() > room - 20);
    for (uint64_t i = 0; i < 20; ++i) {
      CHECK(bench.Read(bench.Move(i, 22, i + 1, i, 1)).status == DiskStatus::kOk);
      CHECK(bench.Holds(i, 22, i + 1));
    }
  }
  Bench bench(folder.path);  // what was stored by a codec is read without the wish for one
  bench.Recover();
  CHECK(bench.store->used_bytes() == used);
  CHECK(bench.Read(bench.Move(3, 22, 1, 3, 1)).status == DiskStatus::kOk);
  CHECK(bench.Holds(3, 22, 1));
}

void TestAFullStoreSaysSo() {
  Folder folder;
  const DiskPlan plan = PlanDisk(100'000, kShare, 1);
  Bench bench(folder.path, 1, "", 100'000);
  const uint64_t n = bench.store->Room();
  CHECK(n == plan.n_units / plan.slot_units && n < kSlots && plan.n_records == 2 * n);
  for (uint64_t i = 0; i <= n; ++i) {
    bench.Fill(i, i, 1);
    const DiskMoved moved = bench.Write(bench.Move(i, i, 1, i, 1));
    CHECK(moved.status == (i < n ? DiskStatus::kOk : DiskStatus::kRoom));
  }
  CHECK(bench.store->Room() == 0);
  CHECK(bench.store->Drop(2) == 0);
  CHECK(bench.store->Room() == 1);
  CHECK(bench.Write(bench.Move(n, n, 1, n, 2)).status == DiskStatus::kOk);
  // A record's own slot goes before its next one is looked for.
  CHECK(bench.Write(bench.Move(5, 5, 1, 0, 2)).status == DiskStatus::kOk);
  CHECK(bench.Read(bench.Move(5, 22, 1, 0, 2)).status == DiskStatus::kOk && bench.Holds(5, 22, 1));
}

void TestAnotherBudgetKeepsWhatFits() {
  Folder folder;
  {
    Bench bench(folder.path, 1, "", 200'000);
    for (uint64_t i = 0; i < 20; ++i) {
      bench.Fill(i, i, 1);
      CHECK(bench.Write(bench.Move(i, i, 1, 19 - i, 3)).status == DiskStatus::kOk);
    }
  }
  const auto whole = [&](uint64_t budget) {
    Bench bench(folder.path, 1, "", budget);
    CHECK(bench.status == DiskOpen::kOk);
    DiskRecovered found;
    CHECK(bench.store->Recovered(&found) == 0);
    for (size_t k = 0; k < found.records.size(); ++k) {
      uint64_t i = 0;
      std::memcpy(&i, found.keys.data() + k * kKeyBytes, sizeof i);
      --i;
      const auto record = static_cast<uint64_t>(found.records[k]);
      CHECK(found.generations[k] == 3);
      CHECK(bench.Read(bench.Move(i, 23, k + 1, record, 3)).status == DiskStatus::kOk);
      CHECK(bench.Holds(i, 23, k + 1));
    }
    uint64_t bytes = 0;
    for (const auto& file : std::filesystem::directory_iterator(folder.path)) {
      bytes += file.file_size();
    }
    CHECK(bytes <= budget);
    return found.records.size();
  };
  CHECK(whole(400'000) == 20);
  const size_t fewer = whole(100'000);
  CHECK(fewer > 0 && fewer < 20);
  CHECK(whole(400'000) == fewer);
}

// Of two records that name the same units the later one counts.
void TestUnitsAreOneRecords() {
  Folder folder;
  {
    Bench bench(folder.path);
    bench.Fill(0, 0, 1);
    bench.Fill(1, 1, 1);
    CHECK(bench.Write(bench.Move(0, 0, 1, 0, 1)).status == DiskStatus::kOk);
    std::filesystem::copy_file(folder.path + "/table.kvd", folder.path + "/old");
    CHECK(bench.store->Drop(0) == 0);
    CHECK(bench.Write(bench.Move(1, 1, 1, 1, 1)).status == DiskStatus::kOk);
    CHECK(bench.store->used_bytes() == bench.store->slot_bytes());
  }
  // A power cut that lost the drop: record 0 is back, beside record 1.
  std::fstream old(folder.path + "/old", std::ios::in | std::ios::binary);
  std::fstream table(folder.path + "/table.kvd", std::ios::in | std::ios::out | std::ios::binary);
  std::vector<char> record(sizeof(DiskRecord));
  old.seekg(sizeof(DiskHeader)).read(record.data(), sizeof(DiskRecord));
  table.seekp(sizeof(DiskHeader)).write(record.data(), sizeof(DiskRecord));
  table.close();
  std::filesystem::remove(folder.path + "/old");
  Bench bench(folder.path);
  DiskRecovered found;
  CHECK(bench.store->Recovered(&found) == 0);
  // Its units were not taken lowest first again, so both may stand; the bytes decide.
  for (size_t k = 0; k < found.records.size(); ++k) {
    const auto i = static_cast<uint64_t>(found.records[k]);
    const DiskMoved moved = bench.Read(bench.Move(i, 9, k + 1, i, 1));
    if (moved.status == DiskStatus::kOk) CHECK(bench.Holds(i, 9, k + 1));
  }
}

// Clear() while writes are under way: nothing of before it is there after it, or after a restart.
void TestClearBesideWrites() {
  for (int round = 0; round < 30; ++round) {
    Folder folder;
    {
      Bench bench(folder.path);
      for (uint64_t i = 0; i < kSlots; ++i) bench.Fill(i, i, 1);
      for (uint64_t i = 0; i < kSlots; ++i) CHECK(bench.store->Write(bench.Move(i, i, 1, i, 1)));
      if (round % 3 > 0) bench.store->Wait(1.0);
      CHECK(bench.store->Clear() == 0);
      std::set<uint64_t> done;
      while (done.size() < kSlots) {
        bench.store->Wait(1.0);
        for (const DiskMoved& moved : bench.store->Poll()) CHECK(done.insert(moved.ticket).second);
      }
      CHECK(bench.store->used_bytes() == 0);
    }
    Bench bench(folder.path);
    DiskRecovered found;
    CHECK(bench.store->Recovered(&found) == 0 && found.records.empty());
  }
}

// What failed its checks is kept for people: the newest few, within the budget.
void TestDamagedSlotsAreKept() {
  Folder folder;
  Bench bench(folder.path);
  const uint32_t n_kept = PlanDisk(4 << 20, kShare, 1).n_kept;
  CHECK(n_kept > 1);
  for (uint64_t i = 0; i < n_kept + 2; ++i) {
    bench.Fill(i, 0, i + 1);
    CHECK(bench.Write(bench.Move(i, 0, i + 1, i, 1)).status == DiskStatus::kOk);
    CHECK(bench.Read(bench.Move(i, 9, 1, i, 2)).status == DiskStatus::kRecord);
  }
  uint32_t n = 0;
  for (const auto& file : std::filesystem::directory_iterator(folder.path)) {
    if (file.path().filename().string().starts_with("bad-")) {
      ++n;
      CHECK(file.file_size() == sizeof(DiskRecord) + bench.store->slot_bytes());
    }
  }
  CHECK(n == n_kept);
}

// A flush that fails is told, without a ticket.
void TestAFlushThatFailsIsTold() {
  Folder folder;
  Bench bench(folder.path);
  bench.store.reset();
  bench.options.faults = "fail:flush:5:1";
  bench.options.flush_s = 0.01;
  bench.store =
      DiskStore::Open(bench.options, bench.tables, kNameSpace, &bench.status, &bench.error);
  bench.Fill(0, 0, 1);
  CHECK(bench.store->Write(bench.Move(0, 0, 1, 0, 1)));
  bool told = false;
  for (int turn = 0; turn < 1000 && !told; ++turn) {
    bench.store->Wait(1.0);
    for (const DiskMoved& moved : bench.store->Poll()) {
      told = told || (moved.ticket == 0 && moved.error == EIO);
    }
  }
  CHECK(told);
}

}  // namespace
}  // namespace kvmem

int main() {
  kvmem::TestSpaceIsNobodysTwice();
  kvmem::TestCodecs();
  kvmem::TestInt8IsNear();
  kvmem::TestAnApproximateBlockIsWhole();
  kvmem::TestACodecIsChosenByWhatItSaves();
  kvmem::TestShorterBlocksLeaveRoom();
  kvmem::TestAFullStoreSaysSo();
  kvmem::TestAnotherBudgetKeepsWhatFits();
  kvmem::TestUnitsAreOneRecords();
  kvmem::TestClearBesideWrites();
  kvmem::TestDamagedSlotsAreKept();
  kvmem::TestAFlushThatFailsIsTold();
  kvmem::TestRoundTripAndRestart();
  kvmem::TestWhatIsNotTheBlockIsNotServed();
  kvmem::TestAnEmptiedRecordComesBeforeItsNewBlock();
  kvmem::TestErrorsAreTold();
  kvmem::TestWhoOpens();
  kvmem::TestTheQueueHasABound();
  kvmem::TestDamageIsNeverServed();
  kvmem::TestManyMovesAtOnce();
  return 0;
}
