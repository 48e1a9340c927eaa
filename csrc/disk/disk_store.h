// One folder of blocks on a disk, of one namespace and one arena's geometry: it moves them between
// the arena's slots and numbered records, checks every byte on both ways, and knows at its next
// start what it had. Which record holds which block, and which goes, is the index's to say
// (HostTier, used once more); the record's number and generation are the index's.
//
//   table.kvd    a header, then 128 bytes a record; through the page cache
//   data.kvd     units, preallocated as they are used, a slot being a run of them as long as the
//                block is stored; past the page cache where it can be
//   bad-N.kvd    slots that failed their checks, for people, the newest few
//   lock         held while the store is open
//
// The way of a write, in this order, so that a process killed between any two steps leaves a whole
// block or none (I6): the record is emptied, the slot is written, the record is written. Nothing is
// synced a block, Flush() is; after a power cut any write since the last one may be missing, and
// the checks of disk_format.h find that when the block is read.
//
// Thread safety: any thread may call; operations run on the store's own threads.
//
// Invariants
//   D3  I1, I5: Read() completes an arena slot's descriptors only when its bytes have passed every
//       check.
//   D4  Write() takes only bytes whose descriptors say, before and after the copy, that they are
//       this block, and that match their checksums: what is damaged in the host stays there.
//   D5  I7: all files together never pass disk_bytes; queued writes never pass their bound.
//   D6  Operations on one record are the caller's to order: one at a time.
//   D7  A unit belongs to one record at most. It is given back only when no record on the disk
//       names it any more and no operation under way uses it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "copy/cpu/kernels.h"
#include "copy/slot_table.h"
#include "disk/disk_codec.h"
#include "disk/disk_format.h"
#include "disk/disk_io.h"
#include "disk/disk_slot.h"
#include "disk/disk_space.h"

namespace kvmem {

enum class DiskOpen { kOk, kBusy, kOther, kDamaged, kNoRoom, kError };

// kSource: the arena's slot is not that block, or has moved on. kRecord: the disk's block is not
// what it should be. kError: the disk failed, see `error`. kRoom: no run of units is long enough.
enum class DiskStatus : uint8_t { kOk = 0, kSource = 1, kRecord = 2, kError = 3, kRoom = 4 };

struct DiskOptions {
  std::string folder;
  uint64_t disk_bytes = 0;
  int n_threads = 4;   // while one checks and copies, others keep the disk busy
  size_t queue = 256;  // writes; a read has a slot of the arena to itself, which bounds them
  bool codec = true;   // store shorter what can be
  double flush_s = 5;  // after a write at most, until a power cut can't undo it
  std::string faults;  // FaultyDiskIo; empty in use
};

// A block's way between a slot and a record. `parent` and `depth` are stored with it. `codec`, of a
// write: an approximate one that the block may be stored by, or 0 for exact.
struct DiskMove {
  uint64_t ticket;
  uint64_t slot;
  uint64_t slot_generation;
  uint64_t record;
  uint64_t record_generation;
  uint32_t group;
  uint32_t depth;
  uint32_t codec;
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

// The records of an earlier run, least recently written first.
struct DiskRecovered {
  std::vector<int32_t> records;
  std::vector<uint64_t> generations, checksums;
  std::vector<unsigned char> keys, parents;  // 32 bytes each
};

class DiskStore {
 public:
  // nullptr, *status and a sentence in *error if it can't be opened; kOther, kDamaged: what is
  // there is left as it is. A store of another budget is brought to this one, most recently written
  // blocks first. `tables` are the arena's ranks, which must outlive the store.
  static std::unique_ptr<DiskStore> Open(const DiskOptions& options,
                                         const std::vector<SlotTable>& tables,
                                         const unsigned char* name_space, DiskOpen* status,
                                         std::string* error);
  // Ends what is queued, waits for its threads.
  ~DiskStore();
  DiskStore(const DiskStore&) = delete;
  DiskStore& operator=(const DiskStore&) = delete;

  uint64_t n_records() const { return header_.n_records; }
  uint64_t slot_bytes() const { return plan_.slot_bytes(); }
  bool direct() const { return direct_; }
  bool codec() const { return options_.codec && DiskCodec::Available(); }

  // What was there when it was opened; 0 or errno. Reads the whole table. REQUIRES: once, before
  // any other operation.
  int Recovered(DiskRecovered* recovered);

  // Blocks as they are that there is room for, beyond those that are queued; holes count, too.
  uint64_t Room();
  // Bytes of data.kvd that blocks have.
  uint64_t used_bytes();

  // Queue an operation; false: there are as many writes as may be. REQUIRES: record < n_records(),
  // slot within.
  bool Write(const DiskMove& move) { return Begin(move, true); }
  bool Read(const DiskMove& move) { return Begin(move, false); }

  // The record, or all of them, holds nothing any more; 0 or errno. REQUIRES: D6; Clear() may be
  // called while operations are under way, of which none brings anything back.
  int Drop(uint64_t record);
  int Clear();

  // Operations that are over, each told once. Ticket 0: a flush that failed.
  std::vector<DiskMoved> Poll();
  // Until n are over that Poll() has not told, or so long.
  void Wait(double seconds, size_t n = 1);

  // Everything written so far survives a power cut; 0 or errno.
  int Flush();

  uint64_t n_slots() const { return tables_[0].n_slots(); }

 private:
  struct Queued {
    DiskMove move;
    bool write;
    double begun_s;
    uint64_t epoch;
  };
  // A thread's own: the block as it is and as it is stored, each behind room for a slot's header.
  struct Buffers;
  struct Busy {
    bool cleared;  // its units go when it is over
    bool pledged;  // its units are among the pledged ones
  };
  // Where a record's slot is; no units: nowhere.
  struct Extent {
    uint32_t place = 0;
    uint32_t units = 0;
  };

  DiskStore(const DiskOptions& options, const std::vector<SlotTable>& tables);
  DiskOpen OpenTable(const unsigned char* name_space, std::string* error);
  DiskOpen CheckHeader(const DiskHeader& there, std::string* error);
  int MakeTable();
  int Resize(const DiskHeader& there);
  int ReadTable(const DiskHeader& header, std::vector<std::pair<uint64_t, DiskRecord>>* found);
  bool Begin(const DiskMove& move, bool write);
  void Run();
  void RunFlushes();
  DiskStatus Do(const Queued& item, Buffers* buffers, DiskMoved* done);
  DiskStatus DoWrite(const Queued& item, Buffers* buffers, DiskMoved* done);
  DiskStatus DoRead(const DiskMove& move, Buffers* buffers, DiskMoved* done);
  SlotFault Deliver(const DiskMove& move, const DiskRecord& wanted, size_t n_read, Buffers* buffers,
                    DiskMoved* done, bool* moved_on);
  bool TakeFromArena(const DiskMove& move, std::byte* payload, DiskRecord* record);
  std::byte* Encode(Buffers* buffers, DiskRecord* record);
  std::byte* EncodeApproximately(uint32_t codec, Buffers* buffers, DiskRecord* record);
  void PutHeader(const DiskRecord& record, std::byte* slot) const;
  DiskStatus Put(const Queued& item, const std::byte* slot, DiskRecord* record, DiskMoved* done);
  uint64_t UnitsFor(uint64_t stored_length) const;
  uint64_t TakeUnits(uint64_t record, uint64_t units);
  void FreeUnits(uint64_t record);
  void FreeUnitsLocked(uint64_t record);  // REQUIRES: space_mutex_
  int Grow(uint64_t end);
  int WriteRecord(uint64_t number, const DiskRecord& record);
  void Keep(DiskRecord wanted, uint64_t number, const std::byte* slot, size_t n);

  // Immutable once open.
  const DiskOptions options_;
  const std::vector<SlotTable> tables_;
  const CopyKernels& kernels_;
  std::unique_ptr<DiskIo> io_;
  DiskHeader header_ = {};
  DiskPlan plan_ = {};
  int lock_fd_ = -1, table_fd_ = -1, data_fd_ = -1;
  bool direct_ = false;
  std::vector<std::thread> threads_;
  std::thread flusher_;

  std::atomic<uint64_t> sequence_{0};
  std::atomic<uint64_t> n_bad_{0};
  CodecChoice choice_;

  std::mutex grow_mutex_;
  uint64_t allocated_ = 0;  // bytes of data.kvd; guarded by grow_mutex_

  // Guarded by table_mutex_: whoever writes a record of an earlier epoch is too late.
  std::mutex table_mutex_;
  uint64_t epoch_ = 0;

  // Guarded by space_mutex_.
  std::mutex space_mutex_;
  std::unique_ptr<DiskSpace> space_;
  std::vector<Extent> extents_;              // of each record
  uint64_t pledged_ = 0;                     // units that queued writes may need
  std::unordered_map<uint64_t, Busy> busy_;  // records of operations under way

  // Guarded by mutex_.
  std::mutex mutex_;
  std::condition_variable to_do_, done_, to_flush_;
  std::deque<Queued> reads_, writes_;
  std::vector<DiskMoved> moved_;
  bool closing_ = false;
  bool flushing_over_ = false;
  bool dirty_ = false;  // something was written since the last flush began
};

}  // namespace kvmem
