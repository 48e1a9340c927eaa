// Whatever stands in table.kvd and data.kvd, a store opened over them serves right blocks or none,
// and DiskVerifier finds good exactly what the store serves.
//
// An input is flags and edits of an honest store's two files: fuzz_edits.h.
//
// What is sealed has right checksums again, so that edits get past them; but for a block's own, by
// which bytes are told from others: a fuzzer that sees both sides of a comparison would forge that,
// and checksums are not against forgers. A slot's header always says the one that the honest block
// of its key has, and for no honest key one that nothing has.
//
// KVMEM_FUZZ_BREAK=1 expects other bytes of one block: the first input must abort.
#include "fuzz_disk.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "arena_bytes.h"
#include "disk/disk_store.h"
#include "disk/disk_verify.h"
#include "fuzz_edits.h"
#include "hash/xxh3.h"

namespace kvmem {

FuzzCounts fuzz_counts = {};

namespace {

constexpr uint64_t kShare = 5000;  // two units as it is, one where a codec made it shorter
constexpr uint64_t kBlocks = 6;
constexpr uint64_t kSlots = 16;
constexpr uint64_t kBudget = 75'000;
constexpr uint64_t kBudgets[] = {kBudget, kBudget / 2, 2 * kBudget, kBudget / 4};
constexpr unsigned char kNameSpace[kKeyBytes] = {7, 7, 7};
constexpr uint64_t kMostSize = 1 << 20;  // of what a sealed header says
constexpr uint64_t kNobodys = 0x6b766d656d;

std::string folder_of_all;

// Aborts, so that libFuzzer keeps the input; the files that it led to can be made again.
[[noreturn]] void Fail(int line, const char* what) {
  std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, line, what);
  std::error_code none;
  std::filesystem::remove_all(folder_of_all, none);
  std::abort();
}

#define HOLDS(condition)                          \
  do {                                            \
    if (!(condition)) Fail(__LINE__, #condition); \
  } while (false)

using Key = std::array<unsigned char, kKeyBytes>;

Key KeyOf(uint64_t i) {
  Key key = {};
  const uint64_t words[2] = {i + 1, Xxh3_64(&i, sizeof i)};
  std::memcpy(key.data(), words, sizeof words);
  return key;
}

// Noise, or 2-byte elements with few different high bytes, which a codec makes shorter.
Bytes BlockOf(uint64_t i) {
  Bytes block(kShare);
  for (uint64_t at = 0; at < kShare; ++at) {
    const uint64_t draw = Xxh3_64(&at, sizeof at) * (2 * i + 1);
    block[at] = static_cast<unsigned char>(i % 2 != 0 && at % 2 != 0 ? 0x3f : draw >> 56);
  }
  return block;
}

class Fuzz {
 public:
  Fuzz() : arena_(kSlots, kShare), tables_{arena_.table()} {
    const bool shm = std::filesystem::is_directory("/dev/shm");
    const auto root =
        shm ? std::filesystem::path("/dev/shm") : std::filesystem::temp_directory_path();
    folder_ = (root / "kvmem-fuzz-XXXXXX").string();
    HOLDS(mkdtemp(folder_.data()) != nullptr);
    folder_of_all = folder_;
    for (uint64_t i = 0; i < kBlocks; ++i) blocks_.push_back(BlockOf(i));
    Fill();
    expected_ = blocks_;
    if (std::getenv("KVMEM_FUZZ_BREAK") != nullptr) expected_[3][17] ^= 1;
  }
  ~Fuzz() { std::filesystem::remove_all(folder_); }

  void Run(const uint8_t* bytes, size_t n);

 private:
  std::unique_ptr<DiskStore> Open(uint64_t disk_bytes);
  DiskMoved Move(DiskStore* store, const DiskMove& move, bool write);
  DiskMoved Store(DiskStore* store, uint64_t i, DiskMove move);
  bool Reads(DiskStore* store, DiskMove move);
  void StoreMore(DiskStore* store, uint64_t record, std::map<uint64_t, DiskMove>* served);
  void Fill();
  void SealAll(uint8_t flags, Files* files) const;
  std::map<uint64_t, DiskMove> Serve(DiskStore* store, bool more);
  void Verify(const std::map<uint64_t, DiskMove>* served, const Bytes& table);
  bool Holds(uint64_t slot, uint64_t generation, const unsigned char* key) const;
  uint64_t SumOf(const unsigned char* key) const;
  Bytes Load(const char* name) const;
  void Save(const char* name, const Bytes& bytes) const;

  TestArena arena_;
  const std::vector<SlotTable> tables_;
  std::string folder_;
  std::vector<Bytes> blocks_;    // of the honest store
  std::vector<Bytes> expected_;  // the same, unless something is broken on purpose
  Files honest_;
  uint64_t generation_ = 0;  // of slots, rising
};

std::unique_ptr<DiskStore> Fuzz::Open(uint64_t disk_bytes) {
  DiskOptions options;
  options.folder = folder_;
  options.disk_bytes = disk_bytes;
  options.n_threads = 1;
  DiskOpen status = DiskOpen::kError;
  std::string error;
  auto store = DiskStore::Open(options, tables_, kNameSpace, &status, &error);
  // Bytes can make it another's or damaged; they can't make the disk fail.
  HOLDS((store != nullptr) == (status == DiskOpen::kOk));
  HOLDS(store != nullptr || status == DiskOpen::kOther || status == DiskOpen::kDamaged);
  return store;
}

DiskMoved Fuzz::Move(DiskStore* store, const DiskMove& move, bool write) {
  HOLDS(write ? store->Write(move) : store->Read(move));
  for (;;) {
    for (const DiskMoved& moved : store->Poll()) return moved;
    store->Wait(60.0);
  }
}

// Block i, by way of the arena's first slot, to the record that `move` names.
DiskMoved Fuzz::Store(DiskStore* store, uint64_t i, DiskMove move) {
  const Key key = KeyOf(i);
  std::memcpy(move.key, key.data(), kKeyBytes);
  move.slot = 0;
  move.ticket = move.slot_generation = ++generation_;
  HOLDS(tables_[0].Claim(0, generation_));
  std::memcpy(tables_[0].Data(0), blocks_[i].data(), kShare);
  const Identity identity = {0, kShare, reinterpret_cast<const std::byte*>(key.data())};
  HOLDS(tables_[0].Complete(0, generation_, identity, SumOf(key.data())));
  return Move(store, move, true);
}

// An honest store, and its bytes.
void Fuzz::Fill() {
  {
    const auto store = Open(kBudget);
    DiskRecovered none;
    HOLDS(store != nullptr && store->Recovered(&none) == 0 && none.records.empty());
    for (uint64_t i = 0; i < kBlocks; ++i) {
      DiskMove move = {};
      if (i > 0) std::memcpy(move.parent, KeyOf(i - 1).data(), kKeyBytes);
      move.record = i;
      move.record_generation = 10 + i;
      HOLDS(Store(store.get(), i, move).status == DiskStatus::kOk);
    }
    const uint64_t n_units = (store->codec() ? 3 : 4) * kBlocks / 2;  // every other one is shorter
    HOLDS(store->used_bytes() == n_units * kDiskAlign);
  }
  honest_ = {Load("table.kvd"), Load("data.kvd")};
}

uint64_t Fuzz::SumOf(const unsigned char* key) const {
  for (uint64_t i = 0; i < kBlocks; ++i) {
    if (std::memcmp(KeyOf(i).data(), key, kKeyBytes) == 0) {
      return Xxh3_64(blocks_[i].data(), kShare);
    }
  }
  return kNobodys;
}

bool Fuzz::Holds(uint64_t slot, uint64_t generation, const unsigned char* key) const {
  const Identity identity = {0, kShare, reinterpret_cast<const std::byte*>(key)};
  if (!tables_[0].IsComplete(slot, generation) || !tables_[0].HasIdentity(slot, identity)) {
    return false;
  }
  for (uint64_t i = 0; i < kBlocks; ++i) {
    if (std::memcmp(KeyOf(i).data(), key, kKeyBytes) != 0) continue;
    return std::memcmp(tables_[0].Data(slot), expected_[i].data(), kShare) == 0;
  }
  return false;
}

void Fuzz::SealAll(uint8_t flags, Files* files) const {
  if ((flags & 1) != 0 && files->table.size() >= sizeof(DiskHeader)) {
    DiskHeader header;
    std::memcpy(&header, files->table.data(), sizeof header);
    // Both readers ask for memory by these before they look further. Damage does not give a header
    // of other sizes a right checksum, and what a forger may do is not asked here.
    const uint64_t sizes[] = {header.n_records, header.n_units, header.unit_bytes,
                              header.share_bytes};
    if (*std::max_element(std::begin(sizes), std::end(sizes)) <= kMostSize) Seal(&header);
    std::memcpy(files->table.data(), &header, sizeof header);
  }
  for (uint64_t number = 0; (flags & 2) != 0; ++number) {
    const size_t at = sizeof(DiskHeader) + number * sizeof(DiskRecord);
    DiskRecord record;
    if (at + sizeof record > files->table.size()) break;
    std::memcpy(&record, files->table.data() + at, sizeof record);
    if (record.generation == 0) continue;
    Seal(&record, number);
    std::memcpy(files->table.data() + at, &record, sizeof record);
  }
  for (size_t at = 0; at + sizeof(DiskSlotHeader) <= files->data.size(); at += kDiskAlign) {
    DiskSlotHeader header;
    std::memcpy(&header, files->data.data() + at, sizeof header);
    if (std::memcmp(header.magic, kDiskSlotMagic, sizeof header.magic) != 0) continue;
    header.payload_checksum = SumOf(header.key);
    const size_t behind = at + sizeof header;
    if ((flags & 4) != 0 && header.stored_length <= files->data.size() - behind) {
      header.stored_checksum = Xxh3_64(files->data.data() + behind, header.stored_length);
      Seal(&header);
    }
    std::memcpy(files->data.data() + at, &header, sizeof header);
  }
}

// Whether the block is answered; what is must be right (I1, I5).
bool Fuzz::Reads(DiskStore* store, DiskMove move) {
  move.slot = 1 + move.record % (kSlots - 1);
  move.ticket = move.slot_generation = ++generation_;
  const DiskMoved moved = Move(store, move, false);
  if (moved.status != DiskStatus::kOk) {
    HOLDS(moved.status == DiskStatus::kRecord);
    HOLDS(!tables_[0].IsComplete(move.slot, move.slot_generation));
    ++fuzz_counts.refused;
    return false;
  }
  HOLDS(Holds(move.slot, move.slot_generation, move.key));
  HOLDS(moved.checksum == SumOf(move.key));
  ++fuzz_counts.served;
  return true;
}

// Reads every record that counts; the answer is which of them came back.
std::map<uint64_t, DiskMove> Fuzz::Serve(DiskStore* store, bool more) {
  DiskRecovered found;
  HOLDS(store->Recovered(&found) == 0);
  fuzz_counts.recovered += found.records.size();
  std::map<uint64_t, DiskMove> served;
  for (size_t k = 0; k < found.records.size(); ++k) {
    DiskMove move = {};
    move.record = static_cast<uint64_t>(found.records[k]);
    move.record_generation = found.generations[k];
    std::memcpy(move.key, &found.keys[k * kKeyBytes], kKeyBytes);
    if (Reads(store, move)) HOLDS(served.emplace(move.record, move).second);
  }
  if (more) {
    const std::set<int32_t> taken(found.records.begin(), found.records.end());
    for (uint64_t record = 0; record < store->n_records(); ++record) {
      if (!taken.contains(static_cast<int32_t>(record))) StoreMore(store, record, &served);
    }
    // What is stored over bytes like these takes no other block's place (D7).
    for (const auto& [record, move] : served) HOLDS(Reads(store, move));
  }
  HOLDS(store->used_bytes() <= 2 * kBudget);  // I7, of the largest
  return served;
}

void Fuzz::StoreMore(DiskStore* store, uint64_t record, std::map<uint64_t, DiskMove>* served) {
  const uint64_t i = record % kBlocks;
  DiskMove move = {};
  std::memcpy(move.key, KeyOf(i).data(), kKeyBytes);
  move.record = record;
  move.record_generation = 1000;
  const DiskStatus status = Store(store, i, move).status;
  HOLDS(status == DiskStatus::kOk || status == DiskStatus::kRoom);
  if (status == DiskStatus::kOk) served->emplace(record, move);
}

// Some group's blocks are good to the verifier, which knows no request, and not to the store, which
// was asked for group 0; and of records with one sequence each takes another for the newest.
bool IsComparable(const Bytes& table) {
  std::set<uint64_t> sequences;
  for (size_t at = sizeof(DiskHeader); at + sizeof(DiskRecord) <= table.size();
       at += sizeof(DiskRecord)) {
    DiskRecord record;
    std::memcpy(&record, table.data() + at, sizeof record);
    if (record.generation == 0) continue;
    if (record.group != 0 || !sequences.insert(record.sequence).second) return false;
  }
  return true;
}

// `served`: nullptr where the store could not be opened.
void Fuzz::Verify(const std::map<uint64_t, DiskMove>* served, const Bytes& table) {
  bool busy = false;
  std::string why;
  const auto verifier = DiskVerifier::Open(folder_, &busy, &why);
  HOLDS(!busy);
  if (verifier == nullptr) {
    HOLDS(served == nullptr && !why.empty());
    return;
  }
  int error = 0;
  while (verifier->Step(3, &error)) {
  }
  HOLDS(error == 0);
  verifier->Found(true);
  if (served == nullptr || !IsComparable(table)) return;
  uint64_t n_good = verifier->n_to_do();
  for (const DiskVerifier::Bad& bad : verifier->Found(false)) {
    HOLDS(!served->contains(bad.record));
    n_good -= std::strcmp(bad.why, "record") != 0;
  }
  HOLDS(n_good == served->size());
}

void Fuzz::Run(const uint8_t* bytes, size_t n) {
  Input input(bytes, n);
  const uint8_t flags = input.Byte();
  Files files = honest_;
  while (!input.over()) Edit(&input, &files);
  SealAll(flags, &files);
  Save("table.kvd", files.table);
  Save("data.kvd", files.data);
  ++fuzz_counts.inputs;
  std::map<uint64_t, DiskMove> served;
  bool opened = false;
  {
    const auto store = Open(kBudgets[flags / 8 % 4]);
    opened = store != nullptr;
    if (opened) served = Serve(store.get(), (flags & 32) != 0);
  }
  fuzz_counts.opened += opened;
  Verify(opened ? &served : nullptr, Load("table.kvd"));
}

Bytes Fuzz::Load(const char* name) const {
  const int fd = open((folder_ + "/" + name).c_str(), O_RDONLY | O_CLOEXEC);
  HOLDS(fd >= 0);
  Bytes bytes(static_cast<size_t>(lseek(fd, 0, SEEK_END)));
  HOLDS(pread(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
  close(fd);
  return bytes;
}

void Fuzz::Save(const char* name, const Bytes& bytes) const {
  const int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC;
  const int fd = open((folder_ + "/" + name).c_str(), flags, 0600);
  HOLDS(fd >= 0);
  HOLDS(write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  close(fd);
}

std::unique_ptr<Fuzz> the_fuzz;

}  // namespace
}  // namespace kvmem

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  kvmem::the_fuzz = std::make_unique<kvmem::Fuzz>();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t n) {
  kvmem::the_fuzz->Run(bytes, n);
  return 0;
}
