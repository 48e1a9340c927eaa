// Looks through a store that nobody has open: every record, every byte of its slots, and whether
// each block's parent is there. Reads only, but for Repair().
//
// Thread safety: none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "disk/disk_codec.h"
#include "disk/disk_format.h"
#include "disk/disk_io.h"
#include "disk/disk_space.h"

namespace kvmem {

class DiskVerifier {
 public:
  struct Bad {
    uint64_t record;
    unsigned char key[kKeyBytes];  // zeros where the record itself is damaged
    // record: it is damaged. units: a later one has its units. parent: what it hangs below is bad
    // or gone. Else NameOf(SlotFault).
    const char* why;
  };
  struct Totals {
    uint64_t records, bytes;  // looked at and read so far
  };

  // nullptr and a sentence in *error; *busy: an engine has it open.
  static std::unique_ptr<DiskVerifier> Open(const std::string& folder, bool* busy,
                                            std::string* error);
  ~DiskVerifier();
  DiskVerifier(const DiskVerifier&) = delete;
  DiskVerifier& operator=(const DiskVerifier&) = delete;

  const DiskHeader& header() const { return header_; }
  uint64_t n_to_do() const { return found_.size(); }

  // Looks at the slots of the next n records, newest first; false if that was all. *error is an
  // errno of the disk, or 0.
  bool Step(uint64_t n, int* error);
  // What is bad so far; with `closure`, also what hangs below it. REQUIRES: Step() said that it was
  // all, for `closure`.
  std::vector<Bad> Found(bool closure) const;
  Totals totals() const { return totals_; }
  // Empties the records of Found(true); 0 or errno.
  int Repair();

 private:
  struct One {
    uint64_t number;
    DiskRecord record;
    const char* why;  // nullptr: sound so far
  };

  DiskVerifier() = default;
  int ReadTable();
  const char* Look(const One& one, int* error);

  DiskIo io_;
  DiskHeader header_ = {};
  int lock_fd_ = -1, table_fd_ = -1, data_fd_ = -1;
  std::vector<One> found_;  // by sequence, newest first
  std::vector<Bad> damaged_;
  size_t next_ = 0;
  Totals totals_ = {};
  std::unique_ptr<DiskSpace> space_;
  std::vector<std::byte> slot_, plain_;
  DiskCodec codec_;
};

}  // namespace kvmem
