"""``python -m rankonce.benchmarks``: kernels and passes in one run, the ceilings measured once."""

from rankonce.benchmarks.command import main

if __name__ == "__main__":
    raise SystemExit(main())
