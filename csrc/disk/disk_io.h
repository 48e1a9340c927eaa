// The system calls of a disk store, in one place so that tests can make them fail.
//
// Thread safety: any thread.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace kvmem {

// Where a write can be cut off; in the order in which a block passes them.
enum class DiskPoint { kBeforeTombstone, kAfterTombstone, kAfterData, kAfterRecord };

class DiskIo {
 public:
  virtual ~DiskIo() = default;

  // 0 or errno. A write is whole or an error; a read may end early, *n_read says where.
  virtual int Write(int fd, const void* bytes, size_t n, uint64_t at);
  virtual int Read(int fd, void* bytes, size_t n, uint64_t at, size_t* n_read);
  virtual int Allocate(int fd, uint64_t at, uint64_t n);
  virtual int Flush(int fd);
  virtual void Passed(DiskPoint point);
};

// For tests and benchmarks only: the real calls with faults, `spec` being any of these, joined by
// commas. nullptr and a sentence in *error where it is no such thing.
//   kill:POINT:N      the process gets SIGKILL at the N-th passing of before_tombstone,
//                     after_tombstone, after_data or after_record
//   fail:CALL:ERRNO:N write, read, allocate or flush fail from their N-th call on
//   tear:BYTES:N      of the N-th write of more than a record only so many bytes arrive
//   flip:BIT:N        that bit is another in what the N-th read of a slot gives, if it is that long
std::unique_ptr<DiskIo> FaultyDiskIo(const std::string& spec, std::string* error);

}  // namespace kvmem
