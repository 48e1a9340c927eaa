// The Python module kvmem._cuda: there only where the build found nvcc, imports without a GPU.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/copy_arrays.h"
#include "copy/cuda/gpu_copier.h"

namespace kvmem::bind {
namespace {

namespace nb = nanobind;
using nb::literals::operator""_a;

constexpr const char* kMethods[] = {"dma", "direct", "staged"};

CopyMethod MethodOf(const std::string& name) {
  const auto found = std::find(std::begin(kMethods), std::end(kMethods), name);
  Require(found != std::end(kMethods), "method is 'auto', 'dma', 'direct' or 'staged'");
  return static_cast<CopyMethod>(found - std::begin(kMethods));
}

cudaStream_t StreamOf(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// A GpuCopier that keeps the arena's mapping alive.
class PyGpuCopier {
 public:
  PyGpuCopier(Buffer arena, int device, int64_t rank, const std::string& method, int grid)
      : arena_(std::move(arena)) {
    Require(rank >= 0 && rank < kMaxRanks, "rank must be 0 to 1023");
    Require(grid >= 1 && grid <= 1024, "grid must be 1 to 1024");
    Require(device >= 0, "device must not be negative");
    if (method != "auto") method_ = MethodOf(method);
    std::string error;
    const auto base = reinterpret_cast<std::byte*>(arena_.data());
    const std::optional<SlotTable> table =
        SlotTable::Open(base, arena_.size(), static_cast<uint32_t>(rank), &error);
    if (!table) throw nb::value_error(error.c_str());
    {
      nb::gil_scoped_release release;  // pinning takes a second for some gigabytes
      copier_ =
          GpuCopier::Make(*table, base, arena_.size(), device, static_cast<unsigned>(grid), &error);
    }
    if (copier_ == nullptr) throw std::runtime_error(error);
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
    if (!method_) {
      Measure(group);
      return;
    }
    for (const CopyWay way : {CopyWay::kToHost, CopyWay::kToDevice}) {
      Require(copier_->SetMethod(group, way, *method_),
              "this method needs pieces of whole 1,024 bytes, aligned to 16; use 'dma' or 'auto'");
    }
  }

  nb::dict Measure(size_t group) {
    Require(copier_->registered(group), "register_layers() comes before measure()");
    double seconds[2][3] = {};
    bool measured = false;
    {
      nb::gil_scoped_release release;
      measured = copier_->Measure(group, seconds);
    }
    if (!measured) throw std::runtime_error(copier_->error());
    nb::dict found;
    for (const size_t way : {0, 1}) {
      nb::dict its;
      for (const size_t method : {0, 1, 2}) {
        if (seconds[way][method] > 0) its[kMethods[method]] = seconds[way][method];
      }
      found[way == 0 ? "store" : "load"] = its;
    }
    return found;
  }

  nb::tuple Methods(size_t group) const {
    Require(copier_->registered(group), "register_layers() comes before methods()");
    const auto name = [&](CopyWay way) {
      return kMethods[static_cast<size_t>(copier_->method(group, way))];
    };
    return nb::make_tuple(name(CopyWay::kToHost), name(CopyWay::kToDevice));
  }

  std::tuple<NewVector<uint8_t>, NewVector<uint64_t>> Store(Vector<int32_t> block_ids,
                                                            Vector<int32_t> slots,
                                                            Vector<uint64_t> generations,
                                                            nb::bytes keys, size_t group,
                                                            uint64_t after) {
    const OwnedRequest owned = Own(block_ids, slots, generations, keys, group);
    RequireDistinct(owned.slots, "a slot is in slots twice");
    const CopyRequest request = owned.View();
    NewVector<uint8_t> status = Zeros<uint8_t>(request.n);
    NewVector<uint64_t> checksums = Zeros<uint64_t>(request.n);
    auto* codes = reinterpret_cast<CopyStatus*>(status.data());
    uint64_t* sums = checksums.data();
    {
      nb::gil_scoped_release release;
      copier_->Store(request, StreamOf(after), codes, sums);
    }
    return {std::move(status), std::move(checksums)};
  }

  NewVector<uint8_t> Load(Vector<int32_t> block_ids, Vector<int32_t> slots,
                          Vector<uint64_t> generations, nb::bytes keys, Vector<uint8_t> verify,
                          size_t group, uint64_t after) {
    const OwnedRequest owned = Own(block_ids, slots, generations, keys, group);
    RequireDistinct(owned.block_ids, "a block is in block_ids twice");
    const CopyRequest request = owned.View();
    Require(verify.size() == request.n, "verify must be as long as block_ids");
    NewVector<uint8_t> status = Zeros<uint8_t>(request.n);
    auto* codes = reinterpret_cast<CopyStatus*>(status.data());
    const std::vector<uint8_t> flags(verify.data(), verify.data() + request.n);
    {
      nb::gil_scoped_release release;
      copier_->Load(request, flags.data(), StreamOf(after), codes);
    }
    return status;
  }

  int device() const { return copier_->device(); }
  std::string error() const { return copier_->error(); }
  uint64_t n_slots() const { return copier_->table().n_slots(); }
  uint64_t slot_bytes() const { return copier_->table().slot_bytes(); }

 private:
  OwnedRequest Own(const Vector<int32_t>& block_ids, const Vector<int32_t>& slots,
                   const Vector<uint64_t>& generations, const nb::bytes& keys, size_t group) const {
    Require(copier_->registered(group), "register_layers() comes before store() and load()");
    return {block_ids, slots, generations, keys, group};
  }

  Buffer arena_;
  std::optional<CopyMethod> method_;
  std::unique_ptr<GpuCopier> copier_;
};

int CountDevices() {
  int n = 0;
  const cudaError_t error = cudaGetDeviceCount(&n);
  if (error == cudaSuccess) return n;
  static_cast<void>(cudaGetLastError());  // no driver, or no device: nothing to copy to
  return 0;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "kvmem's copier for GPUs. There only where the build found nvcc.";
  m.def("n_devices", &CountDevices, "GPUs that this process can use; 0 without a driver.");
  nb::class_<PyGpuCopier>(
      m, "GpuCopier",
      "Moves blocks between a GPU's memory and one rank's shares of an arena's slots, and checks\n"
      "what comes back.\n\n"
      "Statuses are SlotCopier's, and 5: the device failed, see `error`. On any but 0 the block's\n"
      "bytes are undefined. It registers the arena's memory with the device and keeps its buffer\n"
      "alive.\n\n"
      "Args:\n"
      "    arena: an arena's bytes.\n"
      "    device: the GPU's ordinal.\n"
      "    rank: whose shares.\n"
      "    method: 'dma' (copy engines), 'direct' (a kernel on the host's memory), 'staged' (a\n"
      "        kernel, then copy engines), or 'auto': measured when layers are registered.\n"
      "    grid: thread blocks of a kernel, at most.\n\n"
      "Raises:\n"
      "    ValueError: it is no arena, or an argument is out of range.\n"
      "    RuntimeError: the device refused.")
      .def(nb::init<Buffer, int, int64_t, const std::string&, int>(), "arena"_a.noconvert(),
           "device"_a, "rank"_a = 0, "method"_a = "auto", "grid"_a = 16)
      .def("register_layers", &PyGpuCopier::RegisterLayers, "base"_a.noconvert(),
           "stride"_a.noconvert(), "piece"_a.noconvert(), "n_blocks"_a, "group"_a = 0,
           "Tells where block i of each layer of a KV-cache group lies: piece bytes at\n"
           "base + i * stride of the device's memory, which stays the caller's and must outlive\n"
           "the copier's use.")
      .def("measure", &PyGpuCopier::Measure, "group"_a = 0,
           nb::sig("def measure(self, group: int = 0) -> dict[str, dict[str, float]]"),
           "Seconds that each method takes for up to 128 MiB of blocks of this group's shape, by "
           "'store'\n"
           "and 'load'; the better ones are used from now on.")
      .def("methods", &PyGpuCopier::Methods, "group"_a = 0,
           nb::sig("def methods(self, group: int = 0) -> tuple[str, str]"),
           "Which are used, for stores and for loads.")
      .def("store", &PyGpuCopier::Store, "block_ids"_a.noconvert(), "slots"_a.noconvert(),
           "generations"_a.noconvert(), "keys"_a, "group"_a = 0, "after"_a = 0,
           "Device to arena, once what is on the CUDA stream `after` (a handle; 0: the default\n"
           "one) now is done: (status uint8 [n], XXH3-64 of each slot uint64 [n], 0 unless\n"
           "stored). Returns when it is over. Raises ValueError when a slot is named twice.")
      .def("load", &PyGpuCopier::Load, "block_ids"_a.noconvert(), "slots"_a.noconvert(),
           "generations"_a.noconvert(), "keys"_a, "verify"_a.noconvert(), "group"_a = 0,
           "after"_a = 0,
           "Arena to device, once what is on `after` now is done: status uint8 [n]. Where any\n"
           "verify[i] is not 0, all blocks' bytes are hashed as they arrive and compared. Returns\n"
           "when it is over. Raises ValueError when a block is named twice.")
      .def_prop_ro("device", &PyGpuCopier::device)
      .def_prop_ro("error", &PyGpuCopier::error, "What the device failed with last, or empty.")
      .def_prop_ro("n_slots", &PyGpuCopier::n_slots)
      .def_prop_ro("slot_bytes", &PyGpuCopier::slot_bytes);
}

}  // namespace kvmem::bind
