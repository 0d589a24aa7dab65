"""The fuzz: drawn calls of the whole surface against an oracle, run by ``python -m fuzz`` from the folder of tests."""
