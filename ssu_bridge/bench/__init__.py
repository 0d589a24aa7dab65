"""Measuring, run by ``python -m ssu_bridge bench``; nothing else of the package imports it."""
