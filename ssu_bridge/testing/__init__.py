"""Checking a backend: named cases, the comparison with the float64 reference, and the tolerances."""
