#include "disk/disk_verify.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <unordered_map>

#include "disk/disk_slot.h"

namespace kvmem {
namespace {

constexpr uint64_t kRecordsAtATime = 8192;

std::string_view KeyOf(const unsigned char* key) {
  return {reinterpret_cast<const char*>(key), kKeyBytes};
}

bool IsEmpty(const DiskRecord& record) {
  static constexpr DiskRecord kEmpty = {};
  return std::memcmp(&record, &kEmpty, sizeof record) == 0;
}

}  // namespace

std::unique_ptr<DiskVerifier> DiskVerifier::Open(const std::string& folder, bool* busy,
                                                 std::string* error) {
  std::unique_ptr<DiskVerifier> it(new DiskVerifier);
  const auto fail = [&](const std::string& why) {
    *error = why;
    return nullptr;
  };
  *busy = false;
  const auto open_file = [&](const char* name, int* fd) {
    *fd = open((folder + "/" + name).c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (*fd < 0) *error = folder + "/" + name + ": " + std::strerror(errno);
    return *fd >= 0;
  };
  if (!open_file("lock", &it->lock_fd_)) return nullptr;
  if (flock(it->lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    *busy = true;
    return fail(folder + " is in use by an engine");
  }
  if (!open_file("table.kvd", &it->table_fd_)) return nullptr;
  size_t n_read = 0;
  DiskHeader& header = it->header_;
  if (const int code = it->io_.Read(it->table_fd_, &header, sizeof header, 0, &n_read)) {
    return fail(folder + "/table.kvd: " + std::strerror(code));
  }
  if (n_read < sizeof header || std::memcmp(header.magic, kDiskMagic, sizeof header.magic) != 0) {
    return fail(folder + "/table.kvd is no table");
  }
  if (header.version != kDiskVersion || header.byte_order != kDiskByteOrder) {
    return fail(folder + "/table.kvd has version " + std::to_string(header.version) +
                "; this kvmem reads version " + std::to_string(kDiskVersion));
  }
  // Sizes from outside: what they lead to is made of them below.
  const uint64_t slot_bytes = DiskSlotBytes(header.share_bytes * header.ranks);
  if (!IsSound(header) || header.unit_bytes == 0 || header.unit_bytes % kDiskAlign != 0 ||
      header.unit_bytes > slot_bytes || header.ranks == 0 || header.ranks > 1024 ||
      header.share_bytes > (uint64_t{1} << 32) / header.ranks ||
      slot_bytes > 64 * header.unit_bytes || header.n_units > UINT32_MAX ||
      header.n_records > INT32_MAX) {
    return fail(folder + "/table.kvd: its header is damaged");
  }
  if (!open_file("data.kvd", &it->data_fd_)) return nullptr;
  const uint64_t units = (slot_bytes + header.unit_bytes - 1) / header.unit_bytes;
  it->slot_.resize(units * header.unit_bytes);
  it->plain_.resize(units * header.unit_bytes);
  it->space_ = std::make_unique<DiskSpace>(header.n_units);
  if (const int code = it->ReadTable()) {
    return fail(folder + "/table.kvd: " + std::strerror(code));
  }
  return it;
}

DiskVerifier::~DiskVerifier() {
  for (const int fd : {data_fd_, table_fd_, lock_fd_}) {
    if (fd >= 0) close(fd);
  }
}

int DiskVerifier::ReadTable() {
  std::vector<DiskRecord> some(kRecordsAtATime);
  for (uint64_t first = 0; first < header_.n_records; first += kRecordsAtATime) {
    const uint64_t n = std::min(kRecordsAtATime, header_.n_records - first);
    size_t n_read = 0;
    if (const int error = io_.Read(table_fd_, some.data(), n * sizeof(DiskRecord),
                                   sizeof header_ + first * sizeof(DiskRecord), &n_read)) {
      return error;
    }
    for (uint64_t i = 0; i < n_read / sizeof(DiskRecord); ++i) {
      if (IsEmpty(some[i])) continue;
      if (IsSound(some[i], first + i, header_)) {
        found_.push_back({first + i, some[i], nullptr});
      } else {
        damaged_.push_back({first + i, {}, "record"});
      }
    }
    if (n_read < n * sizeof(DiskRecord)) break;  // cut off: the rest holds nothing
  }
  std::sort(found_.begin(), found_.end(),
            [](const One& a, const One& b) { return a.record.sequence > b.record.sequence; });
  totals_.records = damaged_.size();
  return 0;
}

bool DiskVerifier::Step(uint64_t n, int* error) {
  *error = 0;
  const size_t stop = std::min<size_t>(found_.size(), next_ + n);
  for (; next_ < stop; ++next_) {
    One& one = found_[next_];
    one.why = Look(one, error);
    if (*error != 0) return false;
    ++totals_.records;
  }
  return next_ < found_.size();
}

const char* DiskVerifier::Look(const One& one, int* error) {
  const uint32_t units = UnitsOf(one.record, header_);
  if (!space_->TakeAt(one.record.place, units)) return "units";
  size_t n_read = 0;
  *error = io_.Read(data_fd_, slot_.data(), units * header_.unit_bytes,
                    one.record.place * header_.unit_bytes, &n_read);
  if (*error != 0) return "";
  totals_.bytes += n_read;
  SlotBlock block = {};
  const SlotFault fault =
      ReadSlot(header_, one.record, slot_.data(), n_read, &codec_, plain_.data(), &block);
  return fault == SlotFault::kNone ? nullptr : NameOf(fault);
}

std::vector<DiskVerifier::Bad> DiskVerifier::Found(bool closure) const {
  std::vector<Bad> bad = damaged_;
  const auto add = [&](const One& one, const char* why) {
    Bad told = {one.number, {}, why};
    std::memcpy(told.key, one.record.key, kKeyBytes);
    bad.push_back(told);
  };
  if (!closure) {
    for (const One& one : found_) {
      if (one.why != nullptr) add(one, one.why);
    }
    return bad;
  }
  // I2. The newest of several with one key counts; threads write children beside their parents, so
  // no order of the records is that of the chain.
  std::unordered_map<std::string_view, size_t> at;
  for (size_t i = 0; i < found_.size(); ++i) {
    if (found_[i].why == nullptr) at.emplace(KeyOf(found_[i].record.key), i);
  }
  enum Place : uint8_t { kUnseen, kOnPath, kWhole, kCut };
  std::vector<uint8_t> place(found_.size(), kUnseen);
  std::vector<size_t> path;
  for (size_t i = 0; i < found_.size(); ++i) {
    path.clear();
    uint8_t end = kWhole;
    for (size_t one = i;;) {
      if (place[one] != kUnseen) {
        end = place[one] == kOnPath ? uint8_t{kCut} : place[one];  // a ring is no chain
        break;
      }
      place[one] = kOnPath;
      path.push_back(one);
      if (found_[one].why != nullptr) {
        end = kCut;
        break;
      }
      const unsigned char* const parent = found_[one].record.parent;
      if (std::all_of(parent, parent + kKeyBytes, [](unsigned char c) { return c == 0; })) break;
      const auto above = at.find(KeyOf(parent));
      if (above == at.end()) {
        end = kCut;
        break;
      }
      one = above->second;
    }
    for (const size_t passed : path) place[passed] = end;
  }
  for (size_t i = 0; i < found_.size(); ++i) {
    if (place[i] == kCut) add(found_[i], found_[i].why != nullptr ? found_[i].why : "parent");
  }
  return bad;
}

int DiskVerifier::Repair() {
  const DiskRecord empty = {};
  for (const Bad& bad : Found(true)) {
    const uint64_t at = sizeof header_ + bad.record * sizeof empty;
    if (const int error = io_.Write(table_fd_, &empty, sizeof empty, at)) return error;
  }
  return io_.Flush(table_fd_);
}

}  // namespace kvmem
