"""The Torch frontend: tensors go to the kernel as they are, through DLPack's C exchange."""

from ssu_bridge.frontends.torch.frontend import consider, launcher
from ssu_bridge.frontends.torch.host import from_host, to_host
from ssu_bridge.frontends.torch.seeds import seeded

__all__ = ["consider", "from_host", "launcher", "seeded", "to_host"]
