"""What TorchDynamo traces in place of functions of this package that it cannot trace.

It imports no Torch: Dynamo finds the replacements as attributes of the functions. ``_torchdynamo_inline`` names the
function to trace instead; ``_dynamo_marked_constant``, which ``torch.compiler.assume_constant_result`` sets as well,
makes Dynamo call a function while it traces and keep the result. The arguments of such a function are Python constants.
"""

import dataclasses
import itertools
import operator
from typing import Any

from ssu_bridge.config import SSUConfig, get_config, replaced, using
from ssu_bridge.core.problem import Options, options_of


class _Kept:
    """What traced code has been given, an attribute for each.

    Dynamo of Torch 2.14 guards the types of objects whose methods it traces, which it cannot for what a constant
    function returned.
    """


_kept = _Kept()
# No more than configurations and kinds of calls that were traced: compiled code checks that they are still there.
_names: dict[Any, str] = {}
_numbers = itertools.count()

# Of each using() block around what is being traced, the innermost last, the fields that it and those around it replace
# in the configuration in force outside of the graph. Empty outside of tracing.
_blocks: list[dict[str, Any]] = []
# To Dynamo before Torch 2.13 a configuration is no Python constant, but its fields are.
_FIELDS = tuple(field.name for field in dataclasses.fields(SSUConfig))


def tracing() -> bool:
    """Return whether TorchDynamo traces the caller."""
    return False


def options_in_graph(*flags: Any, replay: tuple[int, ...] = ()) -> Options:
    """Return the options of a call that is traced, from the arguments of ``options_of`` but for the configuration."""
    options: Options = getattr(_kept, _options((flags, replay), *_innermost()))
    return options


def _tracing_in_graph() -> bool:
    return True


class _UsingInGraph:
    """A ``using`` block that is traced: the configuration in force is then the one at the time of tracing."""

    def __init__(self, config: SSUConfig | None, fields: dict[str, Any]):
        given = {} if config is None else {name: getattr(config, name) for name in _FIELDS}
        self.fields = {name: _constant(value) for name, value in {**given, **fields}.items()}

    def __enter__(self) -> SSUConfig:
        _blocks.append({**(_blocks[-1] if _blocks else {}), **self.fields})
        return get_config()

    def __exit__(self, *exception: object) -> None:
        _blocks.pop()


def _constant(value: Any) -> Any:
    """Return a field as a constant of the graph: an int that differs between calls is a variable of it otherwise."""
    if isinstance(value, tuple):
        return tuple(_constant(number) for number in value)
    return operator.index(value) if type(value) is int else value


def _using_in_graph(config: SSUConfig | None = None, /, **fields: Any) -> _UsingInGraph:
    return _UsingInGraph(config, fields)


def _get_config_in_graph() -> SSUConfig:
    config: SSUConfig = getattr(_kept, _config(*_innermost()))
    return config


def _replaced_in_graph(config: SSUConfig, *fields: Any) -> SSUConfig:
    """Stand for ``replaced`` in frames that Dynamo traces by themselves: ``config`` is the one in force there."""
    changed: SSUConfig = getattr(_kept, _replaced(fields, *_innermost()))
    return changed


def _innermost() -> tuple[tuple[str, ...], tuple[Any, ...]]:
    fields = _blocks[-1] if _blocks else {}
    return tuple(fields), tuple(fields.values())


def _configured(names: tuple[str, ...], values: tuple[Any, ...]) -> SSUConfig:
    return dataclasses.replace(get_config(), **dict(zip(names, values, strict=True)))


def _keep(value: SSUConfig | Options) -> str:
    """Keep a value and return the name of its attribute; equal ones share it.

    It is kept for good: a compiled graph may refer to it for as long as the process lives.
    """
    name = _names.get(value) or _names.setdefault(value, f"value_{next(_numbers)}")
    # The first one stays: a graph may be guarded by which object it is.
    vars(_kept).setdefault(name, value)
    return name


def _config(*configured: Any) -> str:
    return _keep(_configured(*configured))


def _replaced(fields: tuple[Any, ...], *configured: Any) -> str:
    return _keep(replaced(_configured(*configured), *fields))


def _options(arguments: tuple[tuple[Any, ...], tuple[int, ...]], *configured: Any) -> str:
    flags, replay = arguments
    return _keep(options_of(*(*flags, _configured(*configured), *replay)))


tracing._torchdynamo_inline = _tracing_in_graph  # type: ignore[attr-defined]
using._torchdynamo_inline = _using_in_graph  # type: ignore[attr-defined]
get_config._torchdynamo_inline = _get_config_in_graph  # type: ignore[attr-defined]
replaced._torchdynamo_inline = _replaced_in_graph  # type: ignore[attr-defined]
_config._dynamo_marked_constant = True  # type: ignore[attr-defined]
_replaced._dynamo_marked_constant = True  # type: ignore[attr-defined]
_options._dynamo_marked_constant = True  # type: ignore[attr-defined]
