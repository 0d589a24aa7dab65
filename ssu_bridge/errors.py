"""What can go wrong besides a wrong argument, which is a ValueError or a TypeError."""


class UnsupportedError(NotImplementedError):
    """The call is right, but the backend asked for (or, under ``auto``, every backend) cannot do it."""


class BackendNotAvailableError(ImportError):
    """The backend asked for needs a package that is not installed; the message holds the command that installs it."""


class NotInPlaceError(RuntimeError):
    """JAX gave the new state other memory than the old one had, and ``strict_in_place`` is set.

    The step itself was done. ``results`` is what ``update`` would have returned, so that the state is not lost.
    """

    def __init__(self, message: str, results: tuple[object, ...]):
        super().__init__(message)
        self.results = results
