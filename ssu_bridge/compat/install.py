"""Put the drop-in for mamba_ssm where other packages import it from."""

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_FUNCTION = "selective_state_update"
_MODULE = f"mamba_ssm.ops.triton.{_FUNCTION}"
_PACKAGES = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", _MODULE)
# The first version of transformers that looks for this function alone, without mamba_ssm's others.
_TRANSFORMERS = (5, 16)


def install_as_mamba_ssm(*, force: bool = False) -> contextlib.ExitStack:
    """Make ``mamba_ssm.ops.triton.selective_state_update`` this package's drop-in, for transformers to find it.

    transformers' models then decode with it, those that were imported before as well. Modules of the name mamba_ssm
    that hold nothing else stand in for the package; their version is 0.

    Args:
        force: where the real mamba_ssm is installed, replace its function. Its other functions stay.

    Returns:
        A context manager. Leaving its block, or its ``close()``, undoes all this. If the drop-in was installed already,
        it undoes nothing.

    Raises:
        RuntimeError: mamba_ssm is installed, and ``force`` is not set.
    """
    # Imported here: it imports Torch, and this package does not.
    from ssu_bridge.compat.mamba_ssm import selective_state_update

    undo = contextlib.ExitStack()
    if getattr(sys.modules.get(_MODULE), _FUNCTION, None) is selective_state_update:
        return undo
    undo.callback(_look_again_in_transformers)  # called last
    if "mamba_ssm" not in sys.modules and importlib.util.find_spec("mamba_ssm") is None:
        _add_modules(selective_state_update, undo)
    elif force:
        _replace(selective_state_update, undo)
    else:
        raise RuntimeError(
            "mamba_ssm is installed, and transformers decodes with its kernels; "
            "install_as_mamba_ssm(force=True) replaces its selective_state_update"
        )
    _look_again_in_transformers()
    _warn_of_older_transformers()
    return undo


def _add_modules(function: Callable[..., Any], undo: contextlib.ExitStack) -> None:
    for name in _PACKAGES:
        module = ModuleType(name, "Put here by ssu_bridge.compat.install_as_mamba_ssm.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        undo.callback(sys.modules.pop, name)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    setattr(sys.modules["mamba_ssm"], "__version__", "0+ssu_bridge")  # noqa: B010 (mypy knows no such attribute)
    setattr(sys.modules[_MODULE], _FUNCTION, function)


def _replace(function: Callable[..., Any], undo: contextlib.ExitStack) -> None:
    """Replace the real package's function, also in those of its modules that have imported it by name."""
    real = getattr(importlib.import_module(_MODULE), _FUNCTION)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "mamba_ssm" and getattr(module, _FUNCTION, None) is real:
            setattr(module, _FUNCTION, function)
            undo.callback(setattr, module, _FUNCTION, real)


def _look_again_in_transformers() -> None:
    """Decorate the step anew in models that are imported: transformers' decorator looks for mamba_ssm only once."""
    hub = sys.modules.get("transformers.integrations.hub_kernels")
    decorator = getattr(hub, "use_kernel_func_from_hub_with_fallback", None)
    if decorator is None:
        return
    fixed = []
    for module, name, function in _steps_of_models():
        if hasattr(function, "__wrapped__"):
            setattr(module, name, decorator(_FUNCTION, "mamba_ssm")(function.__wrapped__))
        else:  # the package kernels has made an object of it
            fixed.append(module.__name__)
    if fixed:
        warnings.warn(
            f"{', '.join(fixed)}: imported before, and the package kernels keeps the function that was found then; "
            "call install_as_mamba_ssm before transformers' models are imported",
            RuntimeWarning,
            stacklevel=3,
        )


def _steps_of_models() -> Iterator[tuple[ModuleType, str, Any]]:
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            for attribute, value in list(vars(module).items()):
                if attribute.endswith(_FUNCTION) and callable(value):
                    yield module, attribute, value


def _warn_of_older_transformers() -> None:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _TRANSFORMERS:
        least = ".".join(map(str, _TRANSFORMERS))
        warnings.warn(
            f"transformers {version} uses mamba_ssm's functions all together or not at all, and so not this one; "
            f"pip install 'transformers>={least}'",
            RuntimeWarning,
            stacklevel=3,
        )
