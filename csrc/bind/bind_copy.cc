#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "bind/copy_arrays.h"
#include "copy/slot_copier.h"
#include "copy/slot_scrub.h"

namespace kvmem::bind {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

using Blocks = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstBlocks = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

CpuPath ChoosePath(const std::string& name) {
  if (name == "auto") return DetectCpu();
  const std::optional<CpuPath> path = ParseCpuPath(name);
  if (!path) throw nb::value_error("cpu_path is 'auto', 'plain', 'avx2' or 'avx512'");
  if (*path > DetectCpu()) {
    throw nb::value_error(("this CPU has no " + name + "; use cpu_path='auto'").c_str());
  }
  return *path;
}

// Looks at slots of an arena, all shares of each; keeps its mapping alive.
class PyScrubber {
 public:
  explicit PyScrubber(Buffer arena) : arena_(std::move(arena)) {
    auto* const base = reinterpret_cast<std::byte*>(arena_.data());
    std::string error;
    for (uint32_t rank = 0, ranks = 1; rank < ranks; ++rank) {
      const std::optional<SlotTable> table = SlotTable::Open(base, arena_.size(), rank, &error);
      if (!table) throw nb::value_error(error.c_str());
      if (rank == 0) std::memcpy(&ranks, base + offsetof(ArenaHeader, ranks), sizeof ranks);
      tables_.push_back(*table);
    }
  }

  nb::tuple Check(Vector<int32_t> slots, Vector<uint64_t> generations) {
    const size_t n = slots.size();
    Require(n == generations.size(), "slots and generations must be of one length");
    // As they are while the GIL is held: another thread may change the arrays after.
    const std::vector<int32_t> at(slots.data(), slots.data() + n);
    const std::vector<uint64_t> wanted(generations.data(), generations.data() + n);
    for (const int32_t slot : at) {
      Require(slot >= 0 && static_cast<uint64_t>(slot) < tables_[0].n_slots(), "no such slot");
    }
    NewVector<uint8_t> found = Zeros<uint8_t>(n);
    uint8_t* const codes = found.data();
    uint64_t n_bytes = 0;
    {
      nb::gil_scoped_release release;
      for (size_t i = 0; i < n; ++i) {
        Scrubbed worst = Scrubbed::kSound;
        for (const SlotTable& table : tables_) {
          uint64_t read = 0;
          const Scrubbed one = ScrubShare(table, static_cast<uint64_t>(at[i]), wanted[i], &read);
          n_bytes += read;
          // A slot that moved on in one share did so in all.
          if (one == Scrubbed::kMovedOn) {
            worst = one;
            break;
          }
          worst = std::max(worst, one);
        }
        codes[i] = static_cast<uint8_t>(worst);
      }
    }
    return nb::make_tuple(found, n_bytes);
  }

 private:
  Buffer arena_;
  std::vector<SlotTable> tables_;
};

// A SlotCopier that keeps the arena's mapping alive.
class PySlotCopier {
 public:
  PySlotCopier(Buffer arena, int threads, int64_t rank, const std::string& cpu_path)
      : arena_(std::move(arena)) {
    Require(threads >= 1 && threads <= 64, "threads must be 1 to 64");
    Require(rank >= 0 && rank < kMaxRanks, "rank must be 0 to 1023");
    std::string error;
    const auto base = reinterpret_cast<std::byte*>(arena_.data());
    const std::optional<SlotTable> table =
        SlotTable::Open(base, arena_.size(), static_cast<uint32_t>(rank), &error);
    if (!table) throw nb::value_error(error.c_str());
    copier_ = std::make_unique<SlotCopier>(*table, threads, ChoosePath(cpu_path));
  }

  void RegisterLayers(Vector<uint64_t> base, Vector<uint64_t> stride, Vector<uint64_t> piece,
                      int64_t n_blocks, size_t group) {
    std::vector<Layer> layers = LayersOf(base, stride, piece, n_blocks, group);
    Require(!copier_->registered(group), "layers of this group are registered already");
    std::string error;
    if (!copier_->RegisterLayers(group, std::move(layers), static_cast<uint64_t>(n_blocks),
                                 &error)) {
      throw nb::value_error(error.c_str());
    }
  }

  std::tuple<NewVector<uint8_t>, NewVector<uint64_t>> Store(Vector<int32_t> block_ids,
                                                            Vector<int32_t> slots,
                                                            Vector<uint64_t> generations,
                                                            nb::bytes keys, size_t group) {
    const OwnedRequest owned = Own(block_ids, slots, generations, keys, group);
    RequireDistinct(owned.slots, "a slot is in slots twice");
    const CopyRequest request = owned.View();
    NewVector<uint8_t> status = Zeros<uint8_t>(request.n);
    NewVector<uint64_t> checksums = Zeros<uint64_t>(request.n);
    auto* codes = reinterpret_cast<CopyStatus*>(status.data());
    uint64_t* sums = checksums.data();
    {
      nb::gil_scoped_release release;
      copier_->Store(request, codes, sums);
    }
    return {std::move(status), std::move(checksums)};
  }

  NewVector<uint8_t> Load(Vector<int32_t> block_ids, Vector<int32_t> slots,
                          Vector<uint64_t> generations, nb::bytes keys, Vector<uint8_t> verify,
                          size_t group) {
    const OwnedRequest owned = Own(block_ids, slots, generations, keys, group);
    RequireDistinct(owned.block_ids, "a block is in block_ids twice");
    const CopyRequest request = owned.View();
    Require(verify.size() == request.n, "verify must be as long as block_ids");
    NewVector<uint8_t> status = Zeros<uint8_t>(request.n);
    auto* codes = reinterpret_cast<CopyStatus*>(status.data());
    const std::vector<uint8_t> flags(verify.data(), verify.data() + request.n);
    {
      nb::gil_scoped_release release;
      copier_->Load(request, flags.data(), codes);
    }
    return status;
  }

  int threads() const { return copier_->threads(); }
  const char* cpu_path() const { return CpuPathName(copier_->path()); }
  uint64_t n_slots() const { return copier_->table().n_slots(); }
  uint64_t slot_bytes() const { return copier_->table().slot_bytes(); }

 private:
  OwnedRequest Own(const Vector<int32_t>& block_ids, const Vector<int32_t>& slots,
                   const Vector<uint64_t>& generations, const nb::bytes& keys, size_t group) const {
    Require(copier_->registered(group), "register_layers() comes before store() and load()");
    return {block_ids, slots, generations, keys, group};
  }

  Buffer arena_;
  std::unique_ptr<SlotCopier> copier_;
};

// Rows of `from` to rows of `to`; which side `ids` index is the caller's.
struct RowCopy {
  static constexpr size_t kRows = 64;  // of one work item, with one fence

  const CopyKernels* kernels;
  std::vector<int32_t> ids;
  std::byte* to;
  const std::byte* from;
  size_t piece;
  bool gather;

  size_t Row(size_t i) const { return static_cast<size_t>(ids[i]); }
  const std::byte* From(size_t i) const { return from + (gather ? Row(i) : i) * piece; }
  std::byte* To(size_t i) const { return to + (gather ? i : Row(i)) * piece; }

  static void Item(void* opaque, size_t item) {
    const auto& c = *static_cast<RowCopy*>(opaque);
    const size_t end = std::min(c.ids.size(), (item + 1) * kRows);
    const bool streams = c.kernels->path != CpuPath::kPlain;  // plain is memcpy and nothing else
    for (size_t i = item * kRows; i < end; ++i) {
      if (streams && i + 1 < end) PrefetchPiece(c.From(i + 1), c.piece);
      c.kernels->copy(c.To(i), c.From(i), c.piece);
    }
    c.kernels->fence();
  }
};

void CopyRows(const uint8_t* from, uint8_t* to, Vector<int32_t> ids, size_t rows, size_t piece,
              bool gather, int threads, const std::string& cpu_path) {
  for (size_t i = 0; i < ids.size(); ++i) {
    Require(ids.data()[i] >= 0 && static_cast<size_t>(ids.data()[i]) < rows,
            "an id is outside the pool");
  }
  Require(threads >= 1 && threads <= 64, "threads must be 1 to 64");
  std::vector<int32_t> rows_of(ids.data(), ids.data() + ids.size());
  if (!gather) RequireDistinct(rows_of, "an id is in ids twice");
  RowCopy copy{&KernelsFor(ChoosePath(cpu_path)),
               std::move(rows_of),
               reinterpret_cast<std::byte*>(to),
               reinterpret_cast<const std::byte*>(from),
               piece,
               gather};
  ThreadPool pool(threads);
  nb::gil_scoped_release release;
  pool.For((copy.ids.size() + RowCopy::kRows - 1) / RowCopy::kRows, RowCopy::Item, &copy);
}

void Gather(ConstBlocks pool, Vector<int32_t> ids, Blocks out, int threads,
            const std::string& cpu_path) {
  Require(out.shape(0) == ids.size() && out.shape(1) == pool.shape(1),
          "out must have a row of the pool's length for each id");
  CopyRows(pool.data(), out.data(), ids, pool.shape(0), pool.shape(1), true, threads, cpu_path);
}

void Scatter(ConstBlocks source, Vector<int32_t> ids, Blocks pool, int threads,
             const std::string& cpu_path) {
  Require(source.shape(0) == ids.size() && source.shape(1) == pool.shape(1),
          "source must have a row of the pool's length for each id");
  CopyRows(source.data(), pool.data(), ids, pool.shape(0), pool.shape(1), false, threads, cpu_path);
}

}  // namespace

void RegisterCopy(nb::module_& m) {
  m.def(
      "cpu_path", [] { return CpuPathName(DetectCpu()); },
      "The copy kernels this machine gets: 'avx512', 'avx2' or 'plain'.");
  m.def("gather", &Gather, "pool"_a.noconvert(), "ids"_a.noconvert(), "out"_a.noconvert(),
        "threads"_a = 1, "cpu_path"_a = "auto",
        "Copies row ids[i] of pool [n_blocks, piece] to row i of out [n, piece], uint8. 'plain' is "
        "one memcpy a row.");
  m.def("scatter", &Scatter, "source"_a.noconvert(), "ids"_a.noconvert(), "pool"_a.noconvert(),
        "threads"_a = 1, "cpu_path"_a = "auto",
        "Copies row i of source [n, piece] to row ids[i] of pool [n_blocks, piece], uint8; the "
        "ids differ.");
  nb::class_<PyScrubber>(m, "SlotScrubber",
                         "Looks at an arena's slots, beside those who write them. Any thread.")
      .def(nb::init<Buffer>(), "arena"_a.noconvert(),
           "Keeps the buffer alive.\n\nRaises:\n    ValueError: it is no arena.")
      .def("check", &PyScrubber::Check, "slots"_a.noconvert(), "generations"_a.noconvert(),
           nb::sig("def check(self, slots: numpy.typing.NDArray[numpy.int32], "
                   "generations: numpy.typing.NDArray[numpy.uint64]) -> "
                   "tuple[numpy.typing.NDArray[numpy.uint8], int]"),
           "Whether each slot's bytes, all ranks', have their checksums: 0 they do, 1 they do\n"
           "not, 2 it holds something else by now; and how many bytes were read.");
  nb::class_<PySlotCopier>(
      m, "SlotCopier",
      "Moves blocks between device memory and one rank's shares of an arena's slots, and checks\n"
      "what comes back.\n\n"
      "Statuses: 0 ok, 1 the slot holds another block, 2 the slot has moved on (seen before or\n"
      "after the copy), 3 the bytes are not the ones stored, 4 no such block or slot. On any but "
      "0\n"
      "the block's bytes are undefined. Keeps the arena's buffer alive.")
      .def(nb::init<Buffer, int, int64_t, const std::string&>(), "arena"_a.noconvert(), "threads"_a,
           "rank"_a = 0, "cpu_path"_a = "auto")
      .def("register_layers", &PySlotCopier::RegisterLayers, "base"_a.noconvert(),
           "stride"_a.noconvert(), "piece"_a.noconvert(), "n_blocks"_a, "group"_a = 0,
           "Tells where block i of each layer of a KV-cache group lies: piece bytes at\n"
           "base + i * stride. The memory stays the caller's and must outlive the copier's use.")
      .def(
          "store", &PySlotCopier::Store, "block_ids"_a.noconvert(), "slots"_a.noconvert(),
          "generations"_a.noconvert(), "keys"_a, "group"_a = 0,
          "Device to arena: (status uint8 [n], XXH3-64 of each slot uint64 [n], 0 unless stored).\n"
          "A generation that the slot has already passed is refused with 2. Raises ValueError when "
          "a\n"
          "slot is named twice.")
      .def("load", &PySlotCopier::Load, "block_ids"_a.noconvert(), "slots"_a.noconvert(),
           "generations"_a.noconvert(), "keys"_a, "verify"_a.noconvert(), "group"_a = 0,
           "Arena to device: status uint8 [n]. verify[i] != 0 compares the checksum of the bytes\n"
           "that were written to the block. Raises ValueError when a block is named twice.")
      .def_prop_ro("threads", &PySlotCopier::threads)
      .def_prop_ro("cpu_path", &PySlotCopier::cpu_path)
      .def_prop_ro("n_slots", &PySlotCopier::n_slots)
      .def_prop_ro("slot_bytes", &PySlotCopier::slot_bytes);
}

}  // namespace kvmem::bind
