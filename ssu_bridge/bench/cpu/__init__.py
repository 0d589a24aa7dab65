"""Benchmarks of the cpu backend."""
