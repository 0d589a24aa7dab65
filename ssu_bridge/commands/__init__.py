"""The commands of ``python -m ssu_bridge``; each returns the process's exit status."""
