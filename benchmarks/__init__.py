"""One question per file: `python -m benchmarks.bench_<question>`."""
