#include "disk/disk_store.h"

#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "copy/copy_hashed.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

constexpr uint64_t kGrowBytes = uint64_t{256} << 20;

double Now() {
  using Seconds = std::chrono::duration<double>;
  return Seconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Free {
  void operator()(std::byte* bytes) const { std::free(bytes); }
};
using Bounce = std::unique_ptr<std::byte, Free>;

Bounce NewBounce(size_t bytes) {
  return Bounce(static_cast<std::byte*>(std::aligned_alloc(kDiskAlign, bytes)));
}

std::byte* Behind(std::byte* slot) { return slot + sizeof(DiskSlotHeader); }

}  // namespace

struct DiskStore::Buffers {
  explicit Buffers(size_t bytes) : plain(NewBounce(bytes)), stored(NewBounce(bytes)) {}
  bool ready() const { return plain != nullptr && stored != nullptr; }

  Bounce plain, stored;
  DiskCodec codec;
};

// ---------------------------------------------------------------------------------------------
// The queue

DiskStore::DiskStore(const DiskOptions& options, const std::vector<SlotTable>& tables)
    : options_(options), tables_(tables), kernels_(KernelsFor(DetectCpu())) {}

DiskStore::~DiskStore() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  to_do_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  {
    // After the last write: an orderly end loses nothing to a power cut.
    const std::lock_guard lock(mutex_);
    flushing_over_ = true;
  }
  to_flush_.notify_all();
  if (flusher_.joinable()) flusher_.join();
  for (const int fd : {data_fd_, table_fd_, lock_fd_}) {
    if (fd >= 0) close(fd);
  }
}

bool DiskStore::Begin(const DiskMove& move, bool write) {
  uint64_t epoch = 0;
  {
    const std::lock_guard lock(table_mutex_);
    epoch = epoch_;
  }
  {
    const std::lock_guard lock(mutex_);
    if (write && writes_.size() >= options_.queue) return false;  // D5
    {
      const std::lock_guard space(space_mutex_);
      busy_[move.record] = {.cleared = false, .pledged = write};
      if (write) pledged_ += plan_.slot_units;
    }
    (write ? writes_ : reads_).push_back({move, write, Now(), epoch});
  }
  to_do_.notify_one();
  return true;
}

void DiskStore::Run() {
  Buffers buffers(plan_.slot_bytes());
  for (;;) {
    Queued item;
    {
      std::unique_lock lock(mutex_);
      to_do_.wait(lock, [&] { return closing_ || !reads_.empty() || !writes_.empty(); });
      // A request waits for a read, nobody for a write.
      std::deque<Queued>& queue = reads_.empty() ? writes_ : reads_;
      if (queue.empty()) return;
      item = queue.front();
      queue.pop_front();
    }
    DiskMoved done = {};
    done.ticket = item.move.ticket;
    done.queued_s = Now() - item.begun_s;
    done.status = Do(item, &buffers, &done);
    {
      const std::lock_guard lock(mutex_);
      moved_.push_back(done);
      dirty_ = dirty_ || item.write;
    }
    done_.notify_all();
    if (item.write) to_flush_.notify_one();
  }
}

// One flush for all that was written in flush_s: one a block would halve the bandwidth.
void DiskStore::RunFlushes() {
  std::unique_lock lock(mutex_);
  for (;;) {
    to_flush_.wait(lock, [&] { return flushing_over_ || dirty_; });
    to_flush_.wait_for(lock, std::chrono::duration<double>(options_.flush_s),
                       [&] { return flushing_over_; });
    if (dirty_) {
      dirty_ = false;
      lock.unlock();
      const int error = Flush();
      lock.lock();
      if (error != 0) {
        DiskMoved failed = {};
        failed.status = DiskStatus::kError;
        failed.error = error;
        moved_.push_back(failed);
        done_.notify_all();
      }
    } else if (flushing_over_) {
      return;
    }
  }
}

DiskStatus DiskStore::Do(const Queued& item, Buffers* buffers, DiskMoved* done) {
  DiskStatus status = DiskStatus::kError;
  if (!buffers->ready()) {
    done->error = ENOMEM;
  } else {
    status = item.write ? DoWrite(item, buffers, done) : DoRead(item.move, buffers, done);
  }
  const std::lock_guard lock(space_mutex_);
  const auto busy = busy_.find(item.move.record);
  const Busy was = busy->second;
  busy_.erase(busy);
  if (was.pledged) pledged_ -= plan_.slot_units;
  if (was.cleared) FreeUnitsLocked(item.move.record);  // D7
  return status;
}

std::vector<DiskMoved> DiskStore::Poll() {
  const std::lock_guard lock(mutex_);
  return std::exchange(moved_, {});
}

void DiskStore::Wait(double seconds, size_t n) {
  std::unique_lock lock(mutex_);
  done_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return moved_.size() >= n; });
}

// ---------------------------------------------------------------------------------------------
// Space

uint64_t DiskStore::UnitsFor(uint64_t stored_length) const {
  return (DiskSlotBytes(stored_length) + plan_.unit_bytes - 1) / plan_.unit_bytes;
}

uint64_t DiskStore::Room() {
  const std::lock_guard lock(space_mutex_);
  const uint64_t used = space_->n_taken() + pledged_;
  return used >= plan_.n_units ? 0 : (plan_.n_units - used) / plan_.slot_units;
}

uint64_t DiskStore::used_bytes() {
  const std::lock_guard lock(space_mutex_);
  return space_->n_taken() * plan_.unit_bytes;
}

uint64_t DiskStore::TakeUnits(uint64_t record, uint64_t units) {
  const std::lock_guard lock(space_mutex_);
  const uint64_t place = space_->Take(static_cast<uint32_t>(units));
  if (place != DiskSpace::kNone) {
    busy_.at(record).pledged = false;
    pledged_ -= plan_.slot_units;
    extents_[record] = {static_cast<uint32_t>(place), static_cast<uint32_t>(units)};
  }
  return place;
}

void DiskStore::FreeUnits(uint64_t record) {
  const std::lock_guard lock(space_mutex_);
  FreeUnitsLocked(record);
}

void DiskStore::FreeUnitsLocked(uint64_t record) {
  Extent& extent = extents_[record];
  if (extent.units > 0) space_->Free(extent.place, extent.units);
  extent = {};
}

int DiskStore::Grow(uint64_t end) {
  const std::lock_guard lock(grow_mutex_);
  if (end <= allocated_) return 0;
  const uint64_t most = plan_.n_units * plan_.unit_bytes;
  const uint64_t step = std::max(kGrowBytes / plan_.unit_bytes, uint64_t{8}) * plan_.unit_bytes;
  const uint64_t wanted = std::min(most, std::max(end, allocated_ + step));
  const int error = io_->Allocate(data_fd_, allocated_, wanted - allocated_);
  if (error == 0) allocated_ = wanted;
  return error;
}

// ---------------------------------------------------------------------------------------------
// Arena to disk

bool DiskStore::TakeFromArena(const DiskMove& move, std::byte* payload, DiskRecord* record) {
  std::vector<uint64_t> sums;
  uint64_t length = 0;
  for (const SlotTable& table : tables_) {
    const SlotDescriptor& d = table.Descriptor(move.slot);
    const uint64_t share = d.length.load(std::memory_order_relaxed);
    const Identity identity = {move.group, share, reinterpret_cast<const std::byte*>(move.key)};
    if (!table.IsComplete(move.slot, move.slot_generation) ||
        !table.HasIdentity(move.slot, identity) || share > header_.share_bytes || share == 0 ||
        (length != 0 && share != length)) {
      return false;
    }
    length = share;
    CopyShared(payload, table.Data(move.slot), length);
    kernels_.fence();  // the bytes are read before the stamp is looked at again
    const uint64_t sum = Xxh3_64(payload, length);
    if (sum != d.checksum.load(std::memory_order_relaxed) ||
        !table.IsComplete(move.slot, move.slot_generation)) {  // D4
      return false;
    }
    sums.push_back(sum);
    record->published_checksum ^= sum;
    payload += length;
  }
  record->share_length = static_cast<uint32_t>(length);
  record->payload_checksum = PayloadChecksum(sums.data(), sums.size());
  return true;
}

// The buffer that holds the block as it is to be stored, and in *record how that is.
std::byte* DiskStore::Encode(Buffers* buffers, DiskRecord* record) {
  const uint64_t n = uint64_t{record->share_length} * header_.ranks;
  const uint64_t units = UnitsFor(n);
  const auto encode = [&](uint32_t how) -> size_t {
    return buffers->codec.Encode(how, Behind(buffers->plain.get()), n,
                                 Behind(buffers->stored.get()), n);
  };
  record->codec = 0;
  record->stored_length = static_cast<uint32_t>(n);
  if (!codec()) return buffers->plain.get();
  uint32_t by = choice_.Of(record->group);
  size_t stored = 0;
  if (by == CodecChoice::kMeasure) {
    const size_t four = encode(4), two = encode(2);
    const uint64_t units_2 = two > 0 ? UnitsFor(two) : units;
    const uint64_t units_4 = four > 0 ? UnitsFor(four) : units;
    choice_.Saw(record->group, units, units_2, units_4);
    by = units_2 <= units_4 ? 2 : 4;
    stored = by == 2 ? two : encode(4);
  } else if (by != 0) {
    stored = encode(by);
  }
  if (stored == 0 || UnitsFor(stored) >= units) return buffers->plain.get();
  record->codec = by;
  record->stored_length = static_cast<uint32_t>(stored);
  return buffers->stored.get();
}

// Likewise; nullptr if it does not pay. The record is then of the block that will be read, which is
// another one: that it is approximate is in its key (I10).
std::byte* DiskStore::EncodeApproximately(uint32_t codec, Buffers* buffers, DiskRecord* record) {
  const uint64_t n = uint64_t{record->share_length} * header_.ranks;
  std::byte* const plain = Behind(buffers->plain.get());
  std::byte* const stored = Behind(buffers->stored.get());
  const size_t length = buffers->codec.Encode(codec, plain, n, stored, n);
  if (length == 0 || UnitsFor(length) >= UnitsFor(n) ||
      !buffers->codec.Decode(codec, stored, length, plain, n)) {
    return nullptr;
  }
  std::vector<uint64_t> sums;
  record->published_checksum = 0;
  for (uint32_t rank = 0; rank < header_.ranks; ++rank) {
    sums.push_back(Xxh3_64(plain + uint64_t{rank} * record->share_length, record->share_length));
    record->published_checksum ^= sums.back();
  }
  record->payload_checksum = PayloadChecksum(sums.data(), sums.size());
  record->codec = codec;
  record->stored_length = static_cast<uint32_t>(length);
  return buffers->stored.get();
}

DiskStatus DiskStore::DoWrite(const Queued& item, Buffers* buffers, DiskMoved* done) {
  const DiskMove& move = item.move;
  const double begin = Now();
  DiskRecord record = {};
  std::memcpy(record.key, move.key, kKeyBytes);
  std::memcpy(record.parent, move.parent, kKeyBytes);
  record.generation = move.record_generation;
  record.group = move.group;
  record.depth = move.depth;
  if (!TakeFromArena(move, Behind(buffers->plain.get()), &record)) return DiskStatus::kSource;
  std::byte* slot = nullptr;
  if (IsApproximate(move.codec)) slot = EncodeApproximately(move.codec, buffers, &record);
  if (slot == nullptr) slot = Encode(buffers, &record);
  PutHeader(record, slot);
  done->check_s = Now() - begin;

  io_->Passed(DiskPoint::kBeforeTombstone);
  // Before its old slot can be another's: it must not stand in the table when that is gone (I6).
  done->error = WriteRecord(move.record, DiskRecord{});
  if (done->error != 0) return DiskStatus::kError;
  io_->Passed(DiskPoint::kAfterTombstone);
  FreeUnits(move.record);
  const DiskStatus status = Put(item, slot, &record, done);
  if (status != DiskStatus::kOk) FreeUnits(move.record);
  done->io_s = Now() - begin - done->check_s;
  return status;
}

// What precedes the stored bytes, and the zeros behind them.
void DiskStore::PutHeader(const DiskRecord& record, std::byte* slot) const {
  DiskSlotHeader header = {};
  std::memcpy(header.magic, kDiskSlotMagic, sizeof header.magic);
  header.generation = record.generation;
  std::memcpy(header.key, record.key, kKeyBytes);
  std::memcpy(header.name_space, header_.name_space, kKeyBytes);
  header.payload_checksum = record.payload_checksum;
  header.share_length = record.share_length;
  header.group = record.group;
  header.codec = record.codec;
  header.ranks = header_.ranks;
  header.stored_length = record.stored_length;
  header.stored_checksum = record.codec == 0 && header_.ranks == 1
                               ? record.payload_checksum
                               : Xxh3_64(Behind(slot), record.stored_length);
  Seal(&header);
  std::memcpy(slot, &header, sizeof header);
  const uint64_t used = sizeof header + record.stored_length;
  std::memset(slot + used, 0, DiskSlotBytes(record.stored_length) - used);
}

// The slot, then the record that names it.
DiskStatus DiskStore::Put(const Queued& item, const std::byte* slot, DiskRecord* record,
                          DiskMoved* done) {
  const uint64_t number = item.move.record;
  const uint64_t units = UnitsFor(record->stored_length);
  const uint64_t place = TakeUnits(number, units);
  if (place == DiskSpace::kNone) return DiskStatus::kRoom;
  record->place = static_cast<uint32_t>(place);
  done->bytes = DiskSlotBytes(record->stored_length);
  done->error = Grow((place + units) * plan_.unit_bytes);
  if (done->error == 0) {
    done->error = io_->Write(data_fd_, slot, done->bytes, place * plan_.unit_bytes);
  }
  if (done->error != 0) return DiskStatus::kError;
  io_->Passed(DiskPoint::kAfterData);
  record->sequence = sequence_.fetch_add(1, std::memory_order_relaxed) + 1;
  Seal(record, number);
  {
    const std::lock_guard lock(table_mutex_);
    if (item.epoch != epoch_) return DiskStatus::kSource;  // all was cleared meanwhile
    done->error = WriteRecord(number, *record);
  }
  if (done->error != 0) return DiskStatus::kError;
  io_->Passed(DiskPoint::kAfterRecord);
  done->checksum = record->published_checksum;
  return DiskStatus::kOk;
}

int DiskStore::WriteRecord(uint64_t number, const DiskRecord& record) {
  return io_->Write(table_fd_, &record, sizeof record, sizeof header_ + number * sizeof record);
}

// ---------------------------------------------------------------------------------------------
// Disk to arena

DiskStatus DiskStore::DoRead(const DiskMove& move, Buffers* buffers, DiskMoved* done) {
  const double begin = Now();
  Extent extent;
  {
    const std::lock_guard lock(space_mutex_);
    extent = extents_[move.record];
  }
  if (extent.units == 0) return DiskStatus::kRecord;
  size_t n_read = 0;
  done->error = io_->Read(data_fd_, buffers->stored.get(), extent.units * plan_.unit_bytes,
                          extent.place * plan_.unit_bytes, &n_read);
  done->io_s = Now() - begin;
  if (done->error != 0) return DiskStatus::kError;
  DiskRecord wanted = {};
  std::memcpy(wanted.key, move.key, kKeyBytes);
  wanted.generation = move.record_generation;
  wanted.group = move.group;
  bool moved_on = false;
  const SlotFault fault = Deliver(move, wanted, n_read, buffers, done, &moved_on);
  if (fault != SlotFault::kNone) {
    Keep(wanted, move.record, buffers->stored.get(), n_read);
    return DiskStatus::kRecord;
  }
  if (moved_on) return DiskStatus::kSource;
  done->bytes = n_read;
  done->check_s = Now() - begin - done->io_s;
  return DiskStatus::kOk;
}

// Checks what was read and puts it into the arena's slot, hashed in the same pass. *moved_on: that
// is another's by now.
SlotFault DiskStore::Deliver(const DiskMove& move, const DiskRecord& wanted, size_t n_read,
                             Buffers* buffers, DiskMoved* done, bool* moved_on) {
  SlotBlock block = {};
  const SlotFault fault = OpenSlot(header_, wanted, buffers->stored.get(), n_read, &buffers->codec,
                                   buffers->plain.get(), &block);
  if (fault != SlotFault::kNone) return fault;
  for (size_t rank = 0; rank < tables_.size(); ++rank) {
    const SlotTable& table = tables_[rank];
    *moved_on = !table.Claim(move.slot, move.slot_generation);
    if (*moved_on) return SlotFault::kNone;
    // A2, I4: kWriting is seen before any byte, every byte before kComplete.
    kernels_.fence();
    block.sums.push_back(CopyHashed(kernels_, table.Data(move.slot),
                                    block.payload + rank * block.share_length, block.share_length));
  }
  kernels_.fence();
  if (!IsWhole(block)) return SlotFault::kBlock;
  const Identity identity = {move.group, block.share_length,
                             reinterpret_cast<const std::byte*>(move.key)};
  for (size_t rank = 0; rank < tables_.size(); ++rank) {  // D3
    *moved_on =
        !tables_[rank].Complete(move.slot, move.slot_generation, identity, block.sums[rank]);
    if (*moved_on) return SlotFault::kNone;
    done->checksum ^= block.sums[rank];
  }
  return SlotFault::kNone;
}

// ---------------------------------------------------------------------------------------------
// The whole

int DiskStore::Drop(uint64_t record) {
  const int error = WriteRecord(record, DiskRecord{});
  // A record that may still stand on the disk keeps its units from others (D7).
  if (error == 0) FreeUnits(record);
  return error;
}

int DiskStore::Clear() {
  {
    const std::lock_guard lock(table_mutex_);
    ++epoch_;
    const auto bytes = static_cast<off_t>(sizeof header_ + header_.n_records * sizeof(DiskRecord));
    if (ftruncate(table_fd_, static_cast<off_t>(sizeof header_)) != 0) return errno;
    if (ftruncate(table_fd_, bytes) != 0) return errno;
  }
  const std::lock_guard lock(space_mutex_);
  for (uint64_t record = 0; record < extents_.size(); ++record) {
    const auto busy = busy_.find(record);
    if (busy == busy_.end()) {
      FreeUnitsLocked(record);
    } else {
      busy->second.cleared = true;
    }
  }
  return 0;
}

int DiskStore::Flush() {
  const int error = io_->Flush(data_fd_);
  return error != 0 ? error : io_->Flush(table_fd_);
}

}  // namespace kvmem
