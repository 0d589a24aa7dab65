"""Benchmarks on an NVIDIA GPU."""
