"""The backends, a module each: ``missing``, ``refusal`` and ``load`` of :mod:`ssu_bridge.backends.base`."""
