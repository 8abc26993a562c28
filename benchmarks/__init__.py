"""Benchmarks against reference implementations, interleaved in one process; not part of the package."""
