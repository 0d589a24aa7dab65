"""Triton device code, and nothing else."""
