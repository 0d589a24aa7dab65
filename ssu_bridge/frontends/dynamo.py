"""What TorchDynamo traces in place of functions of this package that it cannot trace.

It imports no Torch: Dynamo finds the replacements as attributes of the functions. ``_torchdynamo_inline`` names the
function to trace instead; ``_dynamo_marked_constant``, which ``torch.compiler.assume_constant_result`` sets as well,
makes Dynamo call a function while it traces and keep the result. The arguments of such a function are Python constants.
"""

import dataclasses
import itertools
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

# The using() blocks around what is being traced, the innermost last: the configuration that one starts from (None: that
# in force outside of the graph) and the fields replaced in it. Empty outside of tracing.
_blocks: list[tuple[SSUConfig | None, dict[str, Any]]] = []


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
        self.config, self.fields = config, fields

    def __enter__(self) -> SSUConfig:
        if self.config is None and _blocks:
            config, fields = _blocks[-1]
            _blocks.append((config, {**fields, **self.fields}))
        else:
            _blocks.append((self.config, self.fields))
        return get_config()

    def __exit__(self, *exception: object) -> None:
        _blocks.pop()


def _using_in_graph(config: SSUConfig | None = None, /, **fields: Any) -> _UsingInGraph:
    return _UsingInGraph(config, fields)


def _get_config_in_graph() -> SSUConfig:
    config: SSUConfig = getattr(_kept, _config(*_innermost()))
    return config


def _replaced_in_graph(config: SSUConfig, *fields: Any) -> SSUConfig:
    """Stand for ``replaced`` in frames that Dynamo traces by themselves: ``config`` is the one in force there."""
    changed: SSUConfig = getattr(_kept, _replaced(fields, *_innermost()))
    return changed


def _innermost() -> tuple[SSUConfig | None, tuple[str, ...], tuple[Any, ...]]:
    config, fields = _blocks[-1] if _blocks else (None, {})
    return config, tuple(fields), tuple(fields.values())


def _configured(config: SSUConfig | None, names: tuple[str, ...], values: tuple[Any, ...]) -> SSUConfig:
    base = get_config() if config is None else config
    return dataclasses.replace(base, **dict(zip(names, values, strict=True)))


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
