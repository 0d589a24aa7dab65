"""The errors besides those for a wrong argument, which are ValueError and TypeError."""


class UnsupportedError(NotImplementedError):
    """The call is valid, but the requested backend (under ``auto``: every backend) does not support it."""


class BackendNotAvailableError(ImportError):
    """The requested backend needs a package that is not installed; the message has the command that installs it."""


class NotInPlaceError(RuntimeError):
    """JAX gave the new state other memory than the old one had, and ``strict_in_place`` is set.

    The step was computed. ``results`` is what ``update`` would have returned, so that the state is not lost.
    """

    def __init__(self, message: str, results: tuple[object, ...]):
        super().__init__(message)
        self.results = results
