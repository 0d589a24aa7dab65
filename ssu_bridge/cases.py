"""The named cases of ``ssu_bridge.testing.cases``, under their public name."""

from ssu_bridge.testing.cases import CASES, Case, arguments

__all__ = ["CASES", "Case", "arguments"]
