"""The backends, one module or package each, with the interface of ``ssu_bridge.backends.base.BackendModule``."""
