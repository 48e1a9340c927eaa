#!/usr/bin/env bash
# Every check that needs a GPU, in one go and without a network: builds kvmem with its CUDA half into
# build/gpu, runs the kernels' tests (under compute-sanitizer too, where it works), then Python's,
# then measures. The tables and the last line, JSON, are for benchmarks/RESULTS.md.
#
#   benchmarks/gpu.sh [--short] [MODEL]
#
# MODEL: a checkpoint's folder, or SmolLM2's GGUF, for bench_transformers; without it that is left out.
# PY: a Python that has torch with CUDA, numpy, nanobind>=3 with nanobind-backend,
# scikit-build-core, msgspec, xxhash, pytest, hypothesis, transformers; nvcc on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

PY="${PY:-python3}"
SHORT=()
if [ "${1:-}" = --short ]; then SHORT=(--short); shift; fi
MODEL="${1:-}"
OUT="${OUT:-build/gpu/results}"
SITE="$PWD/build/gpu/site"
mkdir -p "$OUT" build/gpu
say() { printf '\n== %s  %s\n' "$(date +%H:%M:%S)" "$*"; }
failed=()

say "the machine"
nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.current,pcie.link.width.current \
  --format=csv,noheader || { echo "gpu.sh: no GPU here; nothing was checked" >&2; exit 2; }
nvcc --version | tail -2 | head -1
"$PY" - <<'PYTHON'
import importlib.util as util
import sys

need = ["torch", "numpy", "nanobind", "nanobind_backend", "scikit_build_core", "msgspec", "xxhash",
        "pytest", "hypothesis", "transformers"]
missing = [name for name in need if util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu.sh: {sys.executable} has no {', '.join(missing)}; install them, or set PY")
import torch
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PYTHON

say "build"
"$PY" -m pip install -q --no-deps --no-index --no-build-isolation --disable-pip-version-check \
  --upgrade --target "$SITE" . 2>&1 | grep -v "dependency resolver" || true
export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}"
# -P: what is installed, not the sources beside us.
"$PY" -P -c 'import kvmem._cuda as c; print(f"{c.__file__}: {c.n_devices()} GPU")'

say "kernels"
nvcc -std=c++17 -O2 -arch=native -Icsrc -c csrc/copy/cuda/kernels.cu -o build/gpu/kernels.o
host=(csrc/copy/cuda/*.cc csrc/copy/copy_request.cc csrc/copy/slot_table.cc csrc/hash/xxh3.cc \
  csrc/hash/xxh3_stream.cc csrc/support/cpu.cc)
nvcc -std=c++20 -O2 -Icsrc "${host[@]}" tests/native/cuda/on_gpu.cc build/gpu/kernels.o \
  -o build/gpu/on_gpu
build/gpu/on_gpu || failed+=("kernels")
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null; then
    log="$OUT/sanitizer-$tool.log"
    if timeout 240 compute-sanitizer --tool "$tool" --error-exitcode 9 build/gpu/on_gpu >"$log" 2>&1; then
      echo "compute-sanitizer $tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -1)"
    else
      echo "compute-sanitizer $tool failed:"; tail -15 "$log"
      failed+=("compute-sanitizer $tool")
    fi
  else
    echo "compute-sanitizer is not here: $tool was not run"
  fi
done

say "tests"
"$PY" -P -m pytest tests/gpu -q -o pythonpath= -o filterwarnings= -p no:cacheprovider \
  2>&1 | tee "$OUT/tests.log" | tail -25
[ "${PIPESTATUS[0]}" = 0 ] || failed+=("tests/gpu")

say "bench_gpu_copy"
"$PY" -P -m benchmarks.bench_gpu_copy "${SHORT[@]}" 2>&1 | tee "$OUT/bench_gpu_copy.log" \
  || failed+=("bench_gpu_copy")

if [ -n "$MODEL" ]; then
  say "bench_transformers"
  if [ -f "$MODEL" ]; then
    mkdir -p build/gpu/model
    "$PY" -P -m kvmem.engines.smollm2 "$MODEL" build/gpu/model
    MODEL=build/gpu/model
  fi
  "$PY" -P -m benchmarks.bench_transformers --device cuda --model "$MODEL" "${SHORT[@]}" 2>&1 \
    | tee "$OUT/bench_transformers.log" || failed+=("bench_transformers")
else
  echo "no MODEL was given: bench_transformers was not run"
fi

if [ ${#failed[@]} -gt 0 ]; then
  printf 'gpu.sh: failed: %s\n' "${failed[*]}"
  exit 1
fi
say "all GPU checks passed"
