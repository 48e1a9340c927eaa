// One folder of blocks on a disk, of one namespace and one arena's geometry: it moves them between
// the arena's slots and numbered records, checks every byte on both ways, and knows at its next
// start what it had. Which record holds which block, and which goes, is the index's to say
// (HostTier, used once more); the record's number and generation are the index's.
//
//   table.kvd   a header, then 128 bytes a record; through the page cache
//   data.kvd    a slot a record, preallocated as it is used; past the page cache where it can be
//   lock        held while the store is open
//
// The way of a write, in this order, so that a process killed between any two steps leaves a whole
// block or none (I6): the record is emptied, the slot is written, the record is written. Nothing is
// synced a block; after a power cut any of these writes may be missing, and the checks of
// disk_format.h find that when the block is read.
//
// Thread safety: any thread may call; operations run on the store's own threads.
//
// Invariants
//   D3  I1, I5: Read() fills an arena slot only with bytes that passed every check, and completes
//       its descriptors only then.
//   D4  Write() takes only bytes whose descriptors say, before and after the copy, that they are
//       this block, and that match their checksums: what is damaged in the host stays there.
//   D5  I7: table and data together never pass disk_bytes; the queue never passes its bound.
//   D6  Operations on one record are the caller's to order: one at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "copy/slot_table.h"
#include "disk/disk_format.h"
#include "disk/disk_io.h"

namespace kvmem {

enum class DiskOpen { kOk, kBusy, kOther, kDamaged, kNoRoom, kError };

// kSource: the arena's slot is not that block, or has moved on. kRecord: the disk's block is not
// what it should be. kError: the disk failed, see `error`.
enum class DiskStatus : uint8_t { kOk = 0, kSource = 1, kRecord = 2, kError = 3 };

struct DiskOptions {
  std::string folder;
  uint64_t disk_bytes = 0;
  int n_threads = 2;
  size_t queue = 256;
  std::string faults;  // FaultyDiskIo; empty in use
};

// A block's way between a slot and a record. `parent` and `depth` are stored with it.
struct DiskMove {
  uint64_t ticket;
  uint64_t slot;
  uint64_t slot_generation;
  uint64_t record;
  uint64_t record_generation;
  uint32_t group;
  uint32_t depth;
  unsigned char key[kKeyBytes];
  unsigned char parent[kKeyBytes];
};

struct DiskMoved {
  uint64_t ticket;
  DiskStatus status;
  int error;          // errno, with kError
  uint64_t checksum;  // what the receiving index publishes the block with
  uint64_t bytes;     // on the disk
  double queued_s, io_s, check_s;
};

// The records of an earlier run, by number.
struct DiskRecovered {
  std::vector<int32_t> records;
  std::vector<uint64_t> generations, checksums, sequences;
  std::vector<unsigned char> keys, parents;  // 32 bytes each
};

class DiskStore {
 public:
  // nullptr, *status and a sentence in *error if it can't be opened; kOther, kDamaged: what is
  // there is left as it is. `tables` are the arena's ranks, which must outlive the store.
  static std::unique_ptr<DiskStore> Open(const DiskOptions& options,
                                         const std::vector<SlotTable>& tables,
                                         const unsigned char* name_space, DiskOpen* status,
                                         std::string* error);
  // Ends what is queued, waits for its threads.
  ~DiskStore();
  DiskStore(const DiskStore&) = delete;
  DiskStore& operator=(const DiskStore&) = delete;

  uint64_t n_records() const { return header_.n_records; }
  uint64_t slot_bytes() const { return header_.slot_bytes; }
  bool direct() const { return direct_; }

  // What was there when it was opened. Reads the whole table.
  int Recovered(DiskRecovered* recovered);

  // Queue an operation; false: the queue is full. REQUIRES: record < n_records(), slot within.
  bool Write(const DiskMove& move) { return Begin(move, true); }
  bool Read(const DiskMove& move) { return Begin(move, false); }

  // The record, or all of them, holds nothing any more; 0 or errno. REQUIRES: D6.
  int Drop(uint64_t record);
  int Clear();

  // Operations that are over, each told once.
  std::vector<DiskMoved> Poll();
  // Until one is over that Poll() has not told, or so long.
  void Wait(double seconds);

  // Everything written so far survives a power cut; 0 or errno.
  int Flush();

  uint64_t n_slots() const { return tables_[0].n_slots(); }

 private:
  struct Queued {
    DiskMove move;
    bool write;
    double begun_s;
  };

  DiskStore(const DiskOptions& options, const std::vector<SlotTable>& tables);
  bool Begin(const DiskMove& move, bool write);
  void Run();
  DiskStatus DoWrite(const DiskMove& move, std::byte* bounce, DiskMoved* done);
  DiskStatus DoRead(const DiskMove& move, std::byte* bounce, DiskMoved* done);
  bool TakeFromArena(const DiskMove& move, std::byte* payload, DiskRecord* record);
  int WriteRecord(uint64_t number, const DiskRecord& record);
  int MakeRoom(uint64_t record);

  // Immutable once open.
  const DiskOptions options_;
  const std::vector<SlotTable> tables_;
  void (*const fence_)();  // the copier's, which orders what memcpy may write past the caches
  std::unique_ptr<DiskIo> io_;
  DiskHeader header_ = {};
  int lock_fd_ = -1, table_fd_ = -1, data_fd_ = -1;
  bool direct_ = false;
  std::vector<std::thread> threads_;

  std::atomic<uint64_t> sequence_{0};

  std::mutex grow_mutex_;
  uint64_t allocated_ = 0;  // bytes of data.kvd; guarded by grow_mutex_

  // Guarded by mutex_.
  std::mutex mutex_;
  std::condition_variable to_do_, done_;
  std::deque<Queued> queue_;
  std::vector<DiskMoved> moved_;
  bool closing_ = false;
};

}  // namespace kvmem
