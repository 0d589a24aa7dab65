"""The errors besides those for a wrong argument, which are ValueError and TypeError."""


class UnsupportedError(NotImplementedError):
    """The call is valid, but the requested backend (under ``auto``: every backend) does not support it."""


class BackendNotAvailableError(ImportError):
    """The requested backend needs a package that is not installed; the message has the command that installs it."""


class TooManyKernelsError(RuntimeError):
    """The process has registered as many kernels with XLA as jax-tvm-ffi holds, and this call needs another one.

    There is one for each distinct set of optional arguments and flags, such as ``pad_slot_id``. Calls of the kernels
    that are registered go on working; the xla backend needs none.
    """


class NotInPlaceError(RuntimeError):
    """JAX gave the new state other memory than the old one had, and ``strict_in_place`` is set.

    The step was computed. ``results`` is what ``update`` would have returned, so that the state is not lost.
    """

    def __init__(self, message: str, results: tuple[object, ...]):
        super().__init__(message)
        self.results = results
