"""The backends, a module each: ``missing``, ``refusal`` and ``load`` of ``ssu_bridge.backends.base``."""
