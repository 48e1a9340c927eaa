#include "disk/disk_io.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <charconv>
#include <optional>
#include <string_view>
#include <vector>

namespace kvmem {

int DiskIo::Write(int fd, const void* bytes, size_t n, uint64_t at) {
  auto from = static_cast<const char*>(bytes);
  while (n > 0) {
    const ssize_t done = pwrite(fd, from, n, static_cast<off_t>(at));
    if (done < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (done == 0) return ENOSPC;
    from += done;
    at += static_cast<uint64_t>(done);
    n -= static_cast<size_t>(done);
  }
  return 0;
}

int DiskIo::Read(int fd, void* bytes, size_t n, uint64_t at, size_t* n_read) {
  auto to = static_cast<char*>(bytes);
  *n_read = 0;
  while (*n_read < n) {
    const ssize_t done = pread(fd, to + *n_read, n - *n_read, static_cast<off_t>(at + *n_read));
    if (done < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (done == 0) return 0;
    *n_read += static_cast<size_t>(done);
  }
  return 0;
}

int DiskIo::Allocate(int fd, uint64_t at, uint64_t n) {
  return posix_fallocate(fd, static_cast<off_t>(at), static_cast<off_t>(n));
}

int DiskIo::Flush(int fd) { return fdatasync(fd) == 0 ? 0 : errno; }

void DiskIo::Passed(DiskPoint) {}

namespace {

constexpr std::string_view kPoints[] = {"before_tombstone", "after_tombstone", "after_data",
                                        "after_record"};
constexpr std::string_view kCalls[] = {"write", "read", "allocate", "flush"};
constexpr size_t kRecordBytes = 128;
constexpr size_t kPage = 4096;  // records are read in other pieces than slots

class Faulty final : public DiskIo {
 public:
  struct Kill {
    size_t point;
    uint64_t n;
  };
  struct Fail {
    size_t call;
    int error;
    uint64_t n;
  };
  struct Tear {
    uint64_t bytes;
    uint64_t n;
  };
  struct Flip {
    uint64_t bit;
    uint64_t n;
  };

  int Write(int fd, const void* bytes, size_t n, uint64_t at) override {
    if (const int error = Failed(0)) return error;
    if (n > kRecordBytes) {
      const uint64_t call = ++large_writes_;
      for (const Tear& tear : tears) {
        if (tear.n == call && tear.bytes < n) return DiskIo::Write(fd, bytes, tear.bytes, at);
      }
    }
    return DiskIo::Write(fd, bytes, n, at);
  }
  int Read(int fd, void* bytes, size_t n, uint64_t at, size_t* n_read) override {
    *n_read = 0;
    if (const int error = Failed(1)) return error;
    const int error = DiskIo::Read(fd, bytes, n, at, n_read);
    const uint64_t call = at % kPage == 0 && n % kPage == 0 ? ++slot_reads_ : 0;
    for (const Flip& flip : flips) {
      if (flip.n != call || flip.bit / 8 >= *n_read) continue;
      static_cast<unsigned char*>(bytes)[flip.bit / 8] ^=
          static_cast<unsigned char>(1 << flip.bit % 8);
    }
    return error;
  }
  int Allocate(int fd, uint64_t at, uint64_t n) override {
    if (const int error = Failed(2)) return error;
    return DiskIo::Allocate(fd, at, n);
  }
  int Flush(int fd) override {
    if (const int error = Failed(3)) return error;
    return DiskIo::Flush(fd);
  }
  void Passed(DiskPoint point) override {
    const auto at = static_cast<size_t>(point);
    const uint64_t n = ++passed_[at];
    for (const Kill& kill : kills) {
      if (kill.point == at && kill.n == n) ::kill(getpid(), SIGKILL);
    }
  }

  std::vector<Kill> kills;
  std::vector<Fail> fails;
  std::vector<Tear> tears;
  std::vector<Flip> flips;

 private:
  int Failed(size_t call) {
    const uint64_t n = ++calls_[call];
    for (const Fail& fail : fails) {
      if (fail.call == call && n >= fail.n) return fail.error;
    }
    return 0;
  }

  std::atomic<uint64_t> calls_[4] = {};
  std::atomic<uint64_t> passed_[4] = {};
  std::atomic<uint64_t> large_writes_{0};
  std::atomic<uint64_t> slot_reads_{0};
};

std::vector<std::string_view> Split(std::string_view text, char by) {
  std::vector<std::string_view> parts;
  for (size_t at; (at = text.find(by)) != std::string_view::npos; text.remove_prefix(at + 1)) {
    parts.push_back(text.substr(0, at));
  }
  parts.push_back(text);
  return parts;
}

std::optional<uint64_t> Number(std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

template <size_t N>
std::optional<size_t> IndexIn(const std::string_view (&names)[N], std::string_view name) {
  for (size_t i = 0; i < N; ++i) {
    if (names[i] == name) return i;
  }
  return std::nullopt;
}

bool Add(Faulty* io, const std::vector<std::string_view>& words) {
  if (words.size() < 3) return false;
  const std::optional<uint64_t> n = Number(words.back());
  if (!n) return false;
  if (words[0] == "kill" && words.size() == 3) {
    const std::optional<size_t> point = IndexIn(kPoints, words[1]);
    if (point) io->kills.push_back({*point, *n});
    return point.has_value();
  }
  if (words[0] == "fail" && words.size() == 4) {
    const std::optional<size_t> call = IndexIn(kCalls, words[1]);
    const std::optional<uint64_t> error = Number(words[2]);
    if (!call || !error || *error == 0 || *error > 4095) return false;
    io->fails.push_back({*call, static_cast<int>(*error), *n});
    return true;
  }
  if (words[0] == "flip" && words.size() == 3) {
    const std::optional<uint64_t> bit = Number(words[1]);
    if (bit) io->flips.push_back({*bit, *n});
    return bit.has_value();
  }
  if (words[0] == "tear" && words.size() == 3) {
    const std::optional<uint64_t> bytes = Number(words[1]);
    if (bytes) io->tears.push_back({*bytes, *n});
    return bytes.has_value();
  }
  return false;
}

}  // namespace

std::unique_ptr<DiskIo> FaultyDiskIo(const std::string& spec, std::string* error) {
  auto io = std::make_unique<Faulty>();
  for (const std::string_view fault : Split(spec, ',')) {
    if (!Add(io.get(), Split(fault, ':'))) {
      error->assign(fault);
      error->append(" is no fault");
      return nullptr;
    }
  }
  return io;
}

}  // namespace kvmem
