// kvmem._core.DiskStore.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "disk/disk_store.h"
#include "disk/disk_verify.h"

namespace kvmem::bind {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;
using Buffer = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Plain = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void Require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

void CopyKey(const nb::bytes& from, unsigned char* to, const char* name) {
  Require(from.size() == kKeyBytes, std::string(name) + " must have 32 bytes");
  std::memcpy(to, from.c_str(), kKeyBytes);
}

const char* NameOf(DiskOpen status) {
  switch (status) {
    case DiskOpen::kOk:
      return "ok";
    case DiskOpen::kBusy:
      return "busy";
    case DiskOpen::kOther:
      return "other";
    case DiskOpen::kDamaged:
      return "damaged";
    case DiskOpen::kNoRoom:
      return "no_room";
    case DiskOpen::kError:
      return "error";
  }
  return "error";
}

// A DiskStore that keeps the arena's mapping alive; `close` is its end.
class PyDiskStore {
 public:
  PyDiskStore(const std::string& folder, Buffer arena, int64_t disk_bytes,
              const nb::bytes& name_space, int threads, int64_t queue, bool codec, double flush_s,
              const std::string& faults)
      : arena_(std::move(arena)) {
    Require(disk_bytes > 0, "disk_bytes must be positive");
    Require(threads >= 1 && threads <= 16, "threads must be 1 to 16");
    Require(flush_s >= 0 && flush_s <= 3600, "flush_s must be 0 to 3600");
    Require(queue >= 1 && queue <= 1 << 20, "queue must be 1 to 1048576");
    unsigned char of[kKeyBytes];
    CopyKey(name_space, of, "namespace");
    std::vector<SlotTable> tables;
    std::string error;
    auto* const base = reinterpret_cast<std::byte*>(arena_.data());
    for (uint32_t rank = 0, ranks = 1; rank < ranks; ++rank) {
      const std::optional<SlotTable> table = SlotTable::Open(base, arena_.size(), rank, &error);
      if (!table) throw nb::value_error(error.c_str());
      if (rank == 0) std::memcpy(&ranks, base + offsetof(ArenaHeader, ranks), sizeof ranks);
      tables.push_back(*table);
    }
    DiskOptions options;
    options.folder = folder;
    options.disk_bytes = static_cast<uint64_t>(disk_bytes);
    options.n_threads = threads;
    options.queue = static_cast<size_t>(queue);
    options.codec = codec;
    options.flush_s = flush_s;
    options.faults = faults;
    DiskOpen status = DiskOpen::kError;
    store_ = DiskStore::Open(options, tables, of, &status, &error);
    if (!store_) {
      // (what, sentence): the caller has errors for these.
      PyErr_SetObject(PyExc_OSError, nb::make_tuple(NameOf(status), error).ptr());
      throw nb::python_error();
    }
  }

  bool Begin(bool write, uint64_t ticket, int64_t slot, uint64_t slot_generation, int64_t record,
             uint64_t record_generation, uint32_t group, const nb::bytes& key,
             const nb::bytes& parent, uint32_t depth, uint32_t codec) {
    DiskStore& store = Opened();
    Require(slot >= 0 && static_cast<uint64_t>(slot) < store.n_slots(), "no such slot");
    CheckRecord(record);
    DiskMove move = {};
    move.ticket = ticket;
    move.slot = static_cast<uint64_t>(slot);
    move.slot_generation = slot_generation;
    move.record = static_cast<uint64_t>(record);
    move.record_generation = record_generation;
    move.group = group;
    Require(codec == 0 || (write && IsApproximate(codec)),
            "codec must be 0, or 8 to 10 of a write");
    move.depth = depth;
    move.codec = codec;
    CopyKey(key, move.key, "key");
    CopyKey(parent, move.parent, "parent");
    return write ? store.Write(move) : store.Read(move);
  }

  int Drop(int64_t record) {
    CheckRecord(record);
    return Opened().Drop(static_cast<uint64_t>(record));
  }
  int Clear() { return Opened().Clear(); }

  nb::list Poll() {
    nb::list told;
    for (const DiskMoved& m : Opened().Poll()) {
      told.append(nb::make_tuple(m.ticket, static_cast<int>(m.status), m.error, m.checksum, m.bytes,
                                 m.queued_s, m.io_s, m.check_s));
    }
    return told;
  }

  void Wait(double seconds, int64_t n) {
    Require(seconds >= 0 && seconds <= 60, "seconds must be 0 to 60");
    Require(n >= 1, "n must be positive");
    DiskStore& store = Opened();
    nb::gil_scoped_release release;
    store.Wait(seconds, static_cast<size_t>(n));
  }

  int Flush() {
    DiskStore& store = Opened();
    nb::gil_scoped_release release;
    return store.Flush();
  }

  nb::tuple Recovered() {
    DiskStore& store = Opened();
    DiskRecovered found;
    int error = 0;
    {
      nb::gil_scoped_release release;
      error = store.Recovered(&found);
    }
    if (error != 0) {
      errno = error;
      PyErr_SetFromErrno(PyExc_OSError);
      throw nb::python_error();
    }
    return nb::make_tuple(ToNumpy(std::move(found.records)), ToNumpy(std::move(found.generations)),
                          ToNumpy(std::move(found.checksums)), ToNumpy(std::move(found.keys)),
                          ToNumpy(std::move(found.parents)));
  }

  void Close() {
    nb::gil_scoped_release release;
    store_.reset();
  }

  uint64_t n_records() { return Opened().n_records(); }
  uint64_t slot_bytes() { return Opened().slot_bytes(); }
  bool direct() { return Opened().direct(); }
  uint64_t room() { return Opened().Room(); }
  uint64_t used_bytes() { return Opened().used_bytes(); }
  bool codec() { return Opened().codec(); }

 private:
  DiskStore& Opened() {
    Require(store_ != nullptr, "the disk store is closed");
    return *store_;
  }
  void CheckRecord(int64_t record) {
    Require(record >= 0 && static_cast<uint64_t>(record) < Opened().n_records(), "no such record");
  }

  Buffer arena_;
  std::unique_ptr<DiskStore> store_;
};

// The codec of the disk tier by itself, for benchmarks and other readers of a store.
class PyDiskCodec {
 public:
  nb::object Encode(uint32_t how, Plain from) {
    Require(how != 0 && IsCodec(how), "codec must be 2, 4 or 8 to 10");
    std::vector<uint8_t> stored(from.size());
    size_t n = 0;
    {
      nb::gil_scoped_release release;
      n = codec_.Encode(how, reinterpret_cast<const std::byte*>(from.data()), from.size(),
                        reinterpret_cast<std::byte*>(stored.data()), stored.size());
    }
    if (n == 0) return nb::none();
    stored.resize(n);
    return ToNumpy(std::move(stored));
  }

  bool Decode(uint32_t how, Plain from, Buffer to) {
    nb::gil_scoped_release release;
    return codec_.Decode(how, reinterpret_cast<const std::byte*>(from.data()), from.size(),
                         reinterpret_cast<std::byte*>(to.data()), to.size());
  }

 private:
  DiskCodec codec_;
};

class PyDiskVerifier {
 public:
  explicit PyDiskVerifier(const std::string& folder) {
    bool busy = false;
    std::string error;
    {
      nb::gil_scoped_release release;
      verifier_ = DiskVerifier::Open(folder, &busy, &error);
    }
    if (!verifier_) {
      PyErr_SetObject(PyExc_OSError, nb::make_tuple(busy ? "busy" : "error", error).ptr());
      throw nb::python_error();
    }
  }

  bool Step(int64_t n) {
    Require(n > 0, "n must be positive");
    int error = 0;
    bool more = false;
    {
      nb::gil_scoped_release release;
      more = Opened().Step(static_cast<uint64_t>(n), &error);
    }
    Raise(error);
    return more;
  }

  nb::list Found(bool closure) {
    std::vector<DiskVerifier::Bad> bad;
    {
      nb::gil_scoped_release release;
      bad = Opened().Found(closure);
    }
    nb::list told;
    for (const DiskVerifier::Bad& one : bad) {
      const nb::bytes key(reinterpret_cast<const char*>(one.key), kKeyBytes);
      told.append(nb::make_tuple(one.record, key, one.why));
    }
    return told;
  }

  void Repair() {
    int error = 0;
    {
      nb::gil_scoped_release release;
      error = Opened().Repair();
    }
    Raise(error);
  }

  nb::tuple Totals() {
    const DiskVerifier::Totals totals = Opened().totals();
    return nb::make_tuple(totals.records, totals.bytes);
  }
  uint64_t n_to_do() { return Opened().n_to_do(); }
  nb::bytes name_space() {
    return nb::bytes(reinterpret_cast<const char*>(Opened().header().name_space), kKeyBytes);
  }
  void Close() { verifier_.reset(); }

 private:
  DiskVerifier& Opened() {
    Require(verifier_ != nullptr, "the store is closed");
    return *verifier_;
  }
  static void Raise(int error) {
    if (error == 0) return;
    errno = error;
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }

  std::unique_ptr<DiskVerifier> verifier_;
};

}  // namespace

void RegisterDisk(nb::module_& m) {
  nb::class_<PyDiskCodec>(m, "DiskCodec", "How blocks are stored shorter. One thread.")
      .def(nb::init<>())
      .def_static("available", &DiskCodec::Available, "Whether this machine has libzstd.so.1.")
      .def("encode", &PyDiskCodec::Encode, "codec"_a, "block"_a.noconvert(),
           nb::sig("def encode(self, codec: int, block: numpy.typing.NDArray[numpy.uint8]) -> "
                   "numpy.typing.NDArray[numpy.uint8] | None"),
           "The stored bytes (docs/formats.md, \"stored\"); None where they would not be fewer.")
      .def("decode", &PyDiskCodec::Decode, "codec"_a, "stored"_a.noconvert(), "block"_a.noconvert(),
           nb::sig("def decode(self, codec: int, stored: numpy.typing.NDArray[numpy.uint8], "
                   "block: numpy.typing.NDArray[numpy.uint8]) -> bool"),
           "Fills `block`; False if these are not the stored bytes of a block of its size.");
  nb::class_<PyDiskVerifier>(m, "DiskVerifier",
                             "Looks through a store that nobody has open. One thread.")
      .def(nb::init<const std::string&>(), "folder"_a,
           "Raises:\n"
           "    OSError: args are what and a sentence; what is busy (an engine has it open) or\n"
           "        error (there is no store, its version is another one, or its header damaged).")
      .def("step", &PyDiskVerifier::Step, "n"_a,
           "Looks at the slots of the next n records, every byte; False if that was all.\n\n"
           "Raises:\n    OSError: the disk failed.")
      .def("found", &PyDiskVerifier::Found, "closure"_a,
           nb::sig("def found(self, closure: bool) -> list[tuple[int, bytes, str]]"),
           "What is bad so far: (record, key, why). With `closure`, when all was looked at, also\n"
           "the blocks whose parents are bad or gone: why is then 'parent'.")
      .def("repair", &PyDiskVerifier::Repair,
           "Empties the records of `found(True)`.\n\nRaises:\n    OSError: the disk failed.")
      .def("totals", &PyDiskVerifier::Totals, nb::sig("def totals(self) -> tuple[int, int]"),
           "Records looked at and bytes read so far.")
      .def("close", &PyDiskVerifier::Close, "Lets go of the store.")
      .def_prop_ro("n_to_do", &PyDiskVerifier::n_to_do, "Slots to look at, in all.")
      .def_prop_ro("namespace", &PyDiskVerifier::name_space);
  nb::class_<PyDiskStore>(
      m, "DiskStore",
      "Moves blocks between an arena's slots and numbered records of a folder, and checks them.\n\n"
      "Any thread may call. Keeps the arena's buffer alive until it goes.")
      .def(nb::init<const std::string&, Buffer, int64_t, const nb::bytes&, int, int64_t, bool,
                    double, const std::string&>(),
           "folder"_a, "arena"_a.noconvert(), "disk_bytes"_a, "namespace"_a, "threads"_a = 4,
           "queue"_a = 256, "codec"_a = true, "flush_s"_a = 5.0, "faults"_a = "",
           "The folder is there and private. `codec`: blocks are stored shorter where that pays.\n"
           "A power cut undoes no write older than `flush_s`.\n"
           "`faults` is for tests: csrc/disk/disk_io.h.\n\n"
           "Raises:\n"
           "    OSError: args are what and a sentence; what is busy (another has it open), other\n"
           "        (another version, model or size), damaged, no_room or error.\n"
           "    ValueError: the arena is none, or an argument is out of range.")
      .def("begin", &PyDiskStore::Begin, "write"_a, "ticket"_a, "slot"_a, "slot_generation"_a,
           "record"_a, "record_generation"_a, "group"_a, "key"_a, "parent"_a, "depth"_a,
           "codec"_a = 0,
           "Queues a copy of a block to its record, or from it; False where the queue is full.\n"
           "One operation on a record at a time. `codec`, of a write: 8 to 10, that it may be "
           "stored\n"
           "as int8, approximately; 0 that it may not.")
      .def("drop", &PyDiskStore::Drop, "record"_a, "The record holds nothing any more; 0 or errno.")
      .def("clear", &PyDiskStore::Clear, "No record holds anything any more; 0 or errno.")
      .def("poll", &PyDiskStore::Poll,
           nb::sig("def poll(self) -> list[tuple[int, int, int, int, int, float, float, float]]"),
           "Operations that are over: (ticket, status, errno, checksum, bytes, queued_s, io_s,\n"
           "check_s). Status 0 ok, 1 the slot is not that block, 2 the record is not, 3 the disk\n"
           "failed, 4 there is no room; ticket 0 is a flush that failed. `checksum` is what the "
           "receiving index publishes the block with.")
      .def("wait", &PyDiskStore::Wait, "seconds"_a, "n"_a = 1,
           "Until n operations are over that were not told yet, or so long.")
      .def("flush", &PyDiskStore::Flush, "What is written survives a power cut; 0 or errno.")
      .def("recovered", &PyDiskStore::Recovered,
           nb::sig("def recovered(self) -> tuple[numpy.typing.NDArray[numpy.int32], "
                   "numpy.typing.NDArray[numpy.uint64], numpy.typing.NDArray[numpy.uint64], "
                   "numpy.typing.NDArray[numpy.uint8], "
                   "numpy.typing.NDArray[numpy.uint8]]"),
           "What was there at the start, least recently written first: records, generations,\n"
           "checksums, keys [n*32], parents [n*32], of the records that are sound. Once, before "
           "any\n"
           "other operation.")
      .def("close", &PyDiskStore::Close, "Ends what is queued; the store can't be used any more.")
      .def_prop_ro("n_records", &PyDiskStore::n_records)
      .def_prop_ro("slot_bytes", &PyDiskStore::slot_bytes, "Of a block as it is.")
      .def_prop_ro("room", &PyDiskStore::room,
                   "Blocks as they are that there is room for, beyond those that are queued.")
      .def_prop_ro("used_bytes", &PyDiskStore::used_bytes, "Bytes of the file that blocks have.")
      .def_prop_ro("codec", &PyDiskStore::codec, "Whether blocks may be stored shorter.")
      .def_prop_ro("direct", &PyDiskStore::direct, "Whether the page cache is passed by.");
}

}  // namespace kvmem::bind
