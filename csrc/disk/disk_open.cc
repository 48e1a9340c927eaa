// Opening a store: a new one, an earlier run's, or one of another budget.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>

#include "disk/disk_store.h"

namespace kvmem {
namespace {

constexpr uint64_t kRecordsAtATime = 8192;
constexpr char kNewTable[] = "/table.kvd.new";

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
  store->io_ =
      options.faults.empty() ? std::make_unique<DiskIo>() : FaultyDiskIo(options.faults, error);
  if (!store->io_) return fail(DiskOpen::kError, *error);
  *status = store->OpenTable(name_space, error);
  if (*status != DiskOpen::kOk) return nullptr;

  const std::string data = options.folder + "/data.kvd";
  store->data_fd_ = OpenPrivate(data, O_DIRECT);
  store->direct_ = store->data_fd_ >= 0;
  if (!store->direct_) store->data_fd_ = OpenPrivate(data, 0);
  if (store->data_fd_ < 0) return fail(DiskOpen::kError, data + ": " + std::strerror(errno));
  // Another budget's file may be longer (I7).
  const uint64_t most = store->plan_.n_units * store->plan_.unit_bytes;
  if (SizeOf(store->data_fd_) > most && ftruncate(store->data_fd_, static_cast<off_t>(most)) != 0) {
    return fail(DiskOpen::kError, data + ": " + std::strerror(errno));
  }
  store->allocated_ = SizeOf(store->data_fd_);
  store->space_ = std::make_unique<DiskSpace>(store->plan_.n_units);
  store->extents_.resize(store->header_.n_records);

  try {
    for (int i = 0; i < options.n_threads; ++i) {
      store->threads_.emplace_back([raw = store.get()] { raw->Run(); });
    }
    store->flusher_ = std::thread([raw = store.get()] { raw->RunFlushes(); });
  } catch (const std::system_error& thrown) {
    return fail(DiskOpen::kError, std::string("no thread: ") + thrown.what());
  }
  return store;
}

DiskOpen DiskStore::OpenTable(const unsigned char* name_space, std::string* error) {
  DiskHeader& wanted = header_;
  plan_ =
      PlanDisk(options_.disk_bytes, tables_[0].slot_bytes(), static_cast<uint32_t>(tables_.size()));
  std::memcpy(wanted.magic, kDiskMagic, sizeof wanted.magic);
  wanted.version = kDiskVersion;
  wanted.byte_order = kDiskByteOrder;
  wanted.n_records = plan_.n_records;
  wanted.unit_bytes = plan_.unit_bytes;
  wanted.n_units = plan_.n_units;
  wanted.share_bytes = tables_[0].slot_bytes();
  wanted.ranks = static_cast<uint32_t>(tables_.size());
  std::memcpy(wanted.name_space, name_space, kKeyBytes);
  Seal(&wanted);
  if (plan_.n_units == 0) {
    *error = "a block takes " + std::to_string(plan_.slot_bytes()) +
             " bytes of disk, and there are " + std::to_string(options_.disk_bytes);
    return DiskOpen::kNoRoom;
  }
  const auto failed = [&](const char* file) {
    *error = options_.folder + "/" + file + ": " + std::strerror(errno);
    return DiskOpen::kError;
  };
  lock_fd_ = OpenPrivate(options_.folder + "/lock", 0);
  if (lock_fd_ < 0) return failed("lock");
  if (flock(lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    *error = options_.folder + " is another engine's";
    return DiskOpen::kBusy;
  }
  table_fd_ = OpenPrivate(options_.folder + "/table.kvd", 0);
  if (table_fd_ < 0) return failed("table.kvd");
  if (SizeOf(table_fd_) == 0) {
    errno = MakeTable();
    return errno == 0 ? DiskOpen::kOk : failed("table.kvd");
  }
  DiskHeader there = {};
  size_t n_read = 0;
  errno = io_->Read(table_fd_, &there, sizeof there, 0, &n_read);
  if (errno != 0) return failed("table.kvd");
  if (n_read < sizeof there || std::memcmp(there.magic, kDiskMagic, sizeof there.magic) != 0) {
    *error = options_.folder + "/table.kvd is no table";
    return DiskOpen::kDamaged;
  }
  const DiskOpen status = CheckHeader(there, error);
  if (status != DiskOpen::kOk || std::memcmp(&there, &wanted, sizeof there) == 0) return status;
  errno = Resize(there);
  return errno == 0 ? DiskOpen::kOk : failed("table.kvd");
}

// Whether it is a store like ours, but for the budget.
DiskOpen DiskStore::CheckHeader(const DiskHeader& there, std::string* error) {
  // Magic, version and byte order keep their places in all versions.
  if (there.version != kDiskVersion || there.byte_order != kDiskByteOrder) {
    *error = options_.folder + "/table.kvd has version " + std::to_string(there.version) +
             "; this kvmem reads version " + std::to_string(kDiskVersion);
    return DiskOpen::kOther;
  }
  if (!IsSound(there)) {
    *error = options_.folder + "/table.kvd: its header is damaged";
    return DiskOpen::kDamaged;
  }
  DiskHeader alike = there;
  alike.n_records = header_.n_records;
  alike.n_units = header_.n_units;
  Seal(&alike);
  if (std::memcmp(&alike, &header_, sizeof alike) != 0 || there.n_records > INT32_MAX ||
      there.n_units > UINT32_MAX) {
    *error = options_.folder + "/table.kvd is of another model or size";
    return DiskOpen::kOther;
  }
  return DiskOpen::kOk;
}

int DiskStore::MakeTable() {
  const uint64_t bytes = sizeof header_ + header_.n_records * sizeof(DiskRecord);
  // The size first: a table that has its header has room for its records.
  if (ftruncate(table_fd_, static_cast<off_t>(bytes)) != 0) return errno;
  const int error = io_->Write(table_fd_, &header_, sizeof header_, 0);
  if (error != 0 && ftruncate(table_fd_, 0) != 0) return errno;
  return error;
}

// The sound records of the table that is open, by number.
int DiskStore::ReadTable(const DiskHeader& header,
                         std::vector<std::pair<uint64_t, DiskRecord>>* found) {
  std::vector<DiskRecord> some(kRecordsAtATime);
  // A size from outside: the file says how many there can be.
  found->reserve(std::min(header.n_records, SizeOf(table_fd_) / sizeof(DiskRecord)));
  for (uint64_t first = 0; first < header.n_records; first += kRecordsAtATime) {
    const uint64_t n = std::min(kRecordsAtATime, header.n_records - first);
    size_t n_read = 0;
    const int error = io_->Read(table_fd_, some.data(), n * sizeof(DiskRecord),
                                sizeof header + first * sizeof(DiskRecord), &n_read);
    if (error != 0) return error;
    // A table that was cut off ends here; the rest of it holds nothing.
    for (uint64_t i = 0; i < n_read / sizeof(DiskRecord); ++i) {
      const DiskRecord& record = some[i];
      if (record.generation == 0 || !IsSound(record, first + i, header)) continue;
      found->emplace_back(first + i, record);
    }
  }
  return 0;
}

// The table for our budget in place of `there`, with the most recently written blocks that fit. The
// old one stands until the new one is whole (I6).
int DiskStore::Resize(const DiskHeader& there) {
  std::vector<std::pair<uint64_t, DiskRecord>> found;
  if (const int error = ReadTable(there, &found)) return error;
  std::erase_if(found, [&](const auto& one) {
    return uint64_t{one.second.place} + UnitsOf(one.second, header_) > header_.n_units;
  });
  std::sort(found.begin(), found.end(),
            [](const auto& a, const auto& b) { return a.second.sequence > b.second.sequence; });
  if (found.size() > header_.n_records) found.resize(header_.n_records);

  const std::string path = options_.folder + kNewTable;
  const int fd = OpenPrivate(path, O_TRUNC);
  if (fd < 0) return errno;
  close(std::exchange(table_fd_, fd));
  int error = MakeTable();
  for (uint64_t i = 0; i < found.size() && error == 0; ++i) {
    Seal(&found[i].second, i);
    error = WriteRecord(i, found[i].second);
  }
  if (error == 0) error = io_->Flush(table_fd_);
  // What was kept for people was within the old budget (I7).
  for (uint64_t i = 0; i < kMostKept; ++i) {
    unlink((options_.folder + "/bad-" + std::to_string(i) + ".kvd").c_str());
  }
  if (error == 0 && rename(path.c_str(), (options_.folder + "/table.kvd").c_str()) != 0) {
    error = errno;
  }
  return error;
}

int DiskStore::Recovered(DiskRecovered* recovered) {
  std::vector<std::pair<uint64_t, DiskRecord>> found;
  if (const int error = ReadTable(header_, &found)) return error;
  std::vector<std::pair<uint64_t, uint32_t>> order;  // by sequence; a record is large to move
  order.reserve(found.size());
  for (const auto& [number, record] : found) {
    order.emplace_back(record.sequence, static_cast<uint32_t>(order.size()));
  }
  std::sort(order.begin(), order.end());
  const std::lock_guard lock(space_mutex_);
  // Newest first: where two name the same units, the older one's bytes are gone (D7).
  for (auto one = order.rbegin(); one != order.rend(); ++one) {
    auto& [number, record] = found[one->second];
    const uint32_t units = UnitsOf(record, header_);
    const bool readable = !NeedsZstd(record.codec) || DiskCodec::Available();
    if (!readable || !space_->TakeAt(record.place, units)) {
      record.generation = 0;
      continue;
    }
    extents_[number] = {record.place, units};
  }
  for (const auto& [sequence, at] : order) {
    const auto& [number, record] = found[at];
    if (record.generation == 0) continue;
    recovered->records.push_back(static_cast<int32_t>(number));
    recovered->generations.push_back(record.generation);
    recovered->checksums.push_back(record.published_checksum);
    recovered->keys.insert(recovered->keys.end(), record.key, record.key + kKeyBytes);
    recovered->parents.insert(recovered->parents.end(), record.parent, record.parent + kKeyBytes);
  }
  if (!order.empty()) sequence_.store(order.back().first, std::memory_order_relaxed);
  return 0;
}

// What was read in place of a block, for people; as best as can be, since the disk is in doubt.
void DiskStore::Keep(DiskRecord wanted, uint64_t number, const std::byte* slot, size_t n) {
  if (plan_.n_kept == 0) return;
  const uint64_t file = n_bad_.fetch_add(1, std::memory_order_relaxed) % plan_.n_kept;
  const std::string path = options_.folder + "/bad-" + std::to_string(file) + ".kvd";
  const int fd = OpenPrivate(path, O_TRUNC);
  if (fd < 0) return;
  Seal(&wanted, number);
  if (io_->Write(fd, &wanted, sizeof wanted, 0) == 0) io_->Write(fd, slot, n, sizeof wanted);
  close(fd);
}

}  // namespace kvmem
