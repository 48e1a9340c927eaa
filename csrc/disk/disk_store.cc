#include "disk/disk_store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <utility>

#include "copy/cpu/kernels.h"
#include "hash/xxh3.h"

namespace kvmem {
namespace {

constexpr uint64_t kGrowBytes = uint64_t{256} << 20;
constexpr size_t kRecordsAtATime = 8192;

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

// Opens or makes a private file of this user's, never through a link.
int OpenPrivate(const std::string& path, int flags) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | flags, 0600);
  if (fd < 0) return -1;
  struct stat about;
  if (fstat(fd, &about) == 0 && S_ISREG(about.st_mode) && about.st_uid == geteuid() &&
      fchmod(fd, 0600) == 0) {
    return fd;
  }
  const int error = errno != 0 ? errno : EPERM;
  close(fd);
  errno = error;
  return -1;
}

uint64_t SizeOf(int fd) {
  struct stat about;
  return fstat(fd, &about) == 0 ? static_cast<uint64_t>(about.st_size) : 0;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Opening

DiskStore::DiskStore(const DiskOptions& options, const std::vector<SlotTable>& tables)
    : options_(options), tables_(tables), fence_(KernelsFor(DetectCpu()).fence) {}

std::unique_ptr<DiskStore> DiskStore::Open(const DiskOptions& options,
                                           const std::vector<SlotTable>& tables,
                                           const unsigned char* name_space, DiskOpen* status,
                                           std::string* error) {
  std::unique_ptr<DiskStore> store(new DiskStore(options, tables));
  const auto fail = [&](DiskOpen what, const std::string& why) {
    *status = what;
    *error = why;
    return nullptr;
  };
  const auto failed = [&](const std::string& file) {
    return fail(DiskOpen::kError, options.folder + "/" + file + ": " + std::strerror(errno));
  };
  store->io_ =
      options.faults.empty() ? std::make_unique<DiskIo>() : FaultyDiskIo(options.faults, error);
  if (!store->io_) return fail(DiskOpen::kError, *error);

  DiskHeader& wanted = store->header_;
  std::memcpy(wanted.magic, kDiskMagic, sizeof wanted.magic);
  wanted.version = kDiskVersion;
  wanted.byte_order = kDiskByteOrder;
  wanted.share_bytes = tables[0].slot_bytes();
  wanted.ranks = static_cast<uint32_t>(tables.size());
  wanted.slot_bytes = DiskSlotBytes(wanted.share_bytes, wanted.ranks);
  wanted.n_records =
      std::min<uint64_t>(DiskRecordsWithin(options.disk_bytes, wanted.slot_bytes), INT32_MAX);
  std::memcpy(wanted.name_space, name_space, kKeyBytes);
  Seal(&wanted);
  if (wanted.n_records == 0) {
    return fail(DiskOpen::kNoRoom, "a block takes " + std::to_string(wanted.slot_bytes) +
                                       " bytes of disk, and there are " +
                                       std::to_string(options.disk_bytes));
  }

  store->lock_fd_ = OpenPrivate(options.folder + "/lock", 0);
  if (store->lock_fd_ < 0) return failed("lock");
  if (flock(store->lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    return fail(DiskOpen::kBusy, options.folder + " is another engine's");
  }
  store->table_fd_ = OpenPrivate(options.folder + "/table.kvd", 0);
  if (store->table_fd_ < 0) return failed("table.kvd");

  DiskHeader there;
  size_t n_read = 0;
  if (SizeOf(store->table_fd_) > 0) {
    errno = store->io_->Read(store->table_fd_, &there, sizeof there, 0, &n_read);
    if (errno != 0) return failed("table.kvd");
    if (n_read < sizeof there || std::memcmp(there.magic, kDiskMagic, sizeof there.magic) != 0) {
      return fail(DiskOpen::kDamaged, options.folder + "/table.kvd is no table");
    }
    // Magic, version and byte order keep their places in all versions.
    if (there.version != kDiskVersion || there.byte_order != kDiskByteOrder) {
      return fail(DiskOpen::kOther,
                  options.folder + "/table.kvd has version " + std::to_string(there.version) +
                      "; this kvmem reads version " + std::to_string(kDiskVersion));
    }
    if (!IsSound(there)) {
      return fail(DiskOpen::kDamaged, options.folder + "/table.kvd: its header is damaged");
    }
    if (std::memcmp(&there, &wanted, sizeof there) != 0) {
      return fail(DiskOpen::kOther, options.folder + "/table.kvd is of another model or size");
    }
  } else {
    const uint64_t bytes = sizeof wanted + wanted.n_records * sizeof(DiskRecord);
    // The size first: a table that has its header has room for its records.
    if (ftruncate(store->table_fd_, static_cast<off_t>(bytes)) != 0) return failed("table.kvd");
    errno = store->io_->Write(store->table_fd_, &wanted, sizeof wanted, 0);
    if (errno != 0) {
      const int why = errno;
      if (ftruncate(store->table_fd_, 0) != 0) errno = why;
      errno = why;
      return failed("table.kvd");
    }
  }
  const std::string data = options.folder + "/data.kvd";
  store->data_fd_ = OpenPrivate(data, O_DIRECT);
  store->direct_ = store->data_fd_ >= 0;
  if (!store->direct_) store->data_fd_ = OpenPrivate(data, 0);
  if (store->data_fd_ < 0) return failed("data.kvd");
  store->allocated_ = SizeOf(store->data_fd_);

  for (int i = 0; i < options.n_threads; ++i) {
    try {
      store->threads_.emplace_back([raw = store.get()] { raw->Run(); });
    } catch (const std::system_error& thrown) {
      return fail(DiskOpen::kError, std::string("no thread: ") + thrown.what());
    }
  }
  *status = DiskOpen::kOk;
  return store;
}

DiskStore::~DiskStore() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  to_do_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  for (const int fd : {data_fd_, table_fd_, lock_fd_}) {
    if (fd >= 0) close(fd);
  }
}

int DiskStore::Recovered(DiskRecovered* recovered) {
  std::vector<DiskRecord> some(kRecordsAtATime);
  uint64_t newest = 0;
  for (uint64_t first = 0; first < header_.n_records; first += kRecordsAtATime) {
    const uint64_t n = std::min<uint64_t>(kRecordsAtATime, header_.n_records - first);
    size_t n_read = 0;
    const int error = io_->Read(table_fd_, some.data(), n * sizeof(DiskRecord),
                                sizeof header_ + first * sizeof(DiskRecord), &n_read);
    if (error != 0) return error;
    // A table that was cut off ends here; the rest of it holds nothing.
    for (uint64_t i = 0; i < n_read / sizeof(DiskRecord); ++i) {
      const DiskRecord& record = some[i];
      if (record.generation == 0 || !IsSound(record, first + i)) continue;
      recovered->records.push_back(static_cast<int32_t>(first + i));
      recovered->generations.push_back(record.generation);
      recovered->checksums.push_back(record.published_checksum);
      recovered->sequences.push_back(record.sequence);
      recovered->keys.insert(recovered->keys.end(), record.key, record.key + kKeyBytes);
      recovered->parents.insert(recovered->parents.end(), record.parent, record.parent + kKeyBytes);
      newest = std::max(newest, record.sequence);
    }
  }
  sequence_.store(newest, std::memory_order_relaxed);
  return 0;
}

// ---------------------------------------------------------------------------------------------
// The queue

bool DiskStore::Begin(const DiskMove& move, bool write) {
  {
    const std::lock_guard lock(mutex_);
    if (queue_.size() >= options_.queue) return false;  // D5
    queue_.push_back({move, write, Now()});
  }
  to_do_.notify_one();
  return true;
}

void DiskStore::Run() {
  const Bounce bounce = NewBounce(header_.slot_bytes);
  for (;;) {
    Queued item;
    {
      std::unique_lock lock(mutex_);
      to_do_.wait(lock, [&] { return closing_ || !queue_.empty(); });
      if (queue_.empty()) return;
      // A request waits for a read, nobody for a write.
      auto next =
          std::find_if(queue_.begin(), queue_.end(), [](const Queued& q) { return !q.write; });
      if (next == queue_.end()) next = queue_.begin();
      item = *next;
      queue_.erase(next);
    }
    DiskMoved done = {};
    done.ticket = item.move.ticket;
    done.queued_s = Now() - item.begun_s;
    if (bounce == nullptr) {
      done.status = DiskStatus::kError;
      done.error = ENOMEM;
    } else {
      done.status = item.write ? DoWrite(item.move, bounce.get(), &done)
                               : DoRead(item.move, bounce.get(), &done);
    }
    {
      const std::lock_guard lock(mutex_);
      moved_.push_back(done);
    }
    done_.notify_all();
  }
}

std::vector<DiskMoved> DiskStore::Poll() {
  const std::lock_guard lock(mutex_);
  return std::exchange(moved_, {});
}

void DiskStore::Wait(double seconds) {
  std::unique_lock lock(mutex_);
  done_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return !moved_.empty(); });
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
    fence_();  // the bytes are read before the stamp is looked at again
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

DiskStatus DiskStore::DoWrite(const DiskMove& move, std::byte* bounce, DiskMoved* done) {
  const double begin = Now();
  DiskRecord record = {};
  std::memcpy(record.key, move.key, kKeyBytes);
  std::memcpy(record.parent, move.parent, kKeyBytes);
  record.generation = move.record_generation;
  record.group = move.group;
  record.depth = move.depth;
  record.place = move.record;
  if (!TakeFromArena(move, bounce + sizeof(DiskSlotHeader), &record)) return DiskStatus::kSource;

  DiskSlotHeader header = {};
  std::memcpy(header.magic, kDiskSlotMagic, sizeof header.magic);
  header.generation = record.generation;
  std::memcpy(header.key, move.key, kKeyBytes);
  std::memcpy(header.name_space, header_.name_space, kKeyBytes);
  header.payload_checksum = record.payload_checksum;
  header.share_length = record.share_length;
  header.group = move.group;
  header.ranks = header_.ranks;
  Seal(&header);
  std::memcpy(bounce, &header, sizeof header);
  const uint64_t bytes = DiskSlotBytes(record.share_length, header_.ranks);
  const uint64_t used = sizeof header + uint64_t{record.share_length} * header_.ranks;
  std::memset(bounce + used, 0, bytes - used);
  done->check_s = Now() - begin;

  const uint64_t at = move.record * header_.slot_bytes;
  io_->Passed(DiskPoint::kBeforeTombstone);
  int error = MakeRoom(move.record);
  // Before the slot is: its old block must not answer with the new one's bytes under it, nor stand
  // in the table when they are gone (I6).
  if (error == 0) error = WriteRecord(move.record, DiskRecord{});
  io_->Passed(DiskPoint::kAfterTombstone);
  if (error == 0) error = io_->Write(data_fd_, bounce, bytes, at);
  io_->Passed(DiskPoint::kAfterData);
  if (error == 0) {
    record.sequence = sequence_.fetch_add(1, std::memory_order_relaxed) + 1;
    Seal(&record, move.record);
    error = WriteRecord(move.record, record);
  }
  io_->Passed(DiskPoint::kAfterRecord);
  done->io_s = Now() - begin - done->check_s;
  done->error = error;
  if (error != 0) return DiskStatus::kError;
  done->bytes = bytes;
  done->checksum = record.published_checksum;
  return DiskStatus::kOk;
}

int DiskStore::MakeRoom(uint64_t record) {
  const uint64_t end = (record + 1) * header_.slot_bytes;
  const std::lock_guard lock(grow_mutex_);
  if (end <= allocated_) return 0;
  const uint64_t most = header_.n_records * header_.slot_bytes;
  const uint64_t step = std::max(kGrowBytes / header_.slot_bytes, uint64_t{8}) * header_.slot_bytes;
  const uint64_t wanted = std::min(most, std::max(end, allocated_ + step));
  const int error = io_->Allocate(data_fd_, allocated_, wanted - allocated_);
  if (error == 0) allocated_ = wanted;
  return error;
}

int DiskStore::WriteRecord(uint64_t number, const DiskRecord& record) {
  return io_->Write(table_fd_, &record, sizeof record, sizeof header_ + number * sizeof record);
}

// ---------------------------------------------------------------------------------------------
// Disk to arena

DiskStatus DiskStore::DoRead(const DiskMove& move, std::byte* bounce, DiskMoved* done) {
  const double begin = Now();
  const uint64_t at = move.record * header_.slot_bytes;
  size_t n_read = 0;
  done->error = io_->Read(data_fd_, bounce, header_.slot_bytes, at, &n_read);
  done->io_s = Now() - begin;
  if (done->error != 0) return DiskStatus::kError;
  DiskSlotHeader header;
  if (n_read < sizeof header) return DiskStatus::kRecord;
  std::memcpy(&header, bounce, sizeof header);
  // D1, I1
  if (!IsSound(header) || header.generation != move.record_generation ||
      std::memcmp(header.key, move.key, kKeyBytes) != 0 ||
      std::memcmp(header.name_space, header_.name_space, kKeyBytes) != 0 ||
      header.group != move.group || header.ranks != header_.ranks || header.codec != 0 ||
      header.share_length == 0 || header.share_length > header_.share_bytes ||
      n_read < sizeof header + uint64_t{header.share_length} * header.ranks) {
    return DiskStatus::kRecord;
  }
  const std::byte* const payload = bounce + sizeof header;
  std::vector<uint64_t> sums;
  for (uint32_t rank = 0; rank < header.ranks; ++rank) {
    sums.push_back(Xxh3_64(payload + uint64_t{rank} * header.share_length, header.share_length));
  }
  if (PayloadChecksum(sums.data(), sums.size()) != header.payload_checksum) {
    return DiskStatus::kRecord;
  }
  for (size_t rank = 0; rank < tables_.size(); ++rank) {  // D3
    const SlotTable& table = tables_[rank];
    if (!table.Claim(move.slot, move.slot_generation)) return DiskStatus::kSource;
    // A2, I4: kWriting is seen before any byte, every byte before kComplete.
    fence_();
    std::memcpy(table.Data(move.slot), payload + rank * header.share_length, header.share_length);
    fence_();
    const Identity identity = {move.group, header.share_length,
                               reinterpret_cast<const std::byte*>(move.key)};
    if (!table.Complete(move.slot, move.slot_generation, identity, sums[rank])) {
      return DiskStatus::kSource;
    }
    done->checksum ^= sums[rank];
  }
  done->bytes = n_read;
  done->check_s = Now() - begin - done->io_s;
  return DiskStatus::kOk;
}

// ---------------------------------------------------------------------------------------------
// The whole

int DiskStore::Drop(uint64_t record) { return WriteRecord(record, DiskRecord{}); }

int DiskStore::Clear() {
  const auto bytes = static_cast<off_t>(sizeof header_ + header_.n_records * sizeof(DiskRecord));
  if (ftruncate(table_fd_, static_cast<off_t>(sizeof header_)) != 0) return errno;
  return ftruncate(table_fd_, bytes) == 0 ? 0 : errno;
}

int DiskStore::Flush() {
  const int error = io_->Flush(data_fd_);
  return error != 0 ? error : io_->Flush(table_fd_);
}

}  // namespace kvmem
