"""Functions with the names, arguments and rules of other packages, for Torch: only the import changes.

Each translates its call into one of ``ssu_bridge.update``, whose backend is the one that is configured. What they
add is what those packages allow and ``update`` does not: arrays that lack axes of size 1, float arrays that lie in
memory in any way, and an output of another float dtype than x.
"""

from ssu_bridge.compat.install import install_as_mamba_ssm

__all__ = ["install_as_mamba_ssm"]
