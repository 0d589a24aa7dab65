"""``python -m ssu_bridge.bench.cuda``."""

from ssu_bridge.bench.cuda.command import main

main()
