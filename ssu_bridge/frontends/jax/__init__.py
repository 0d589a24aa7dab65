"""The JAX frontend: a traced call becomes a primitive, lowered to an XLA FFI call; an eager one a jitted function."""

from ssu_bridge.frontends.jax.frontend import consider, from_host, launcher, seeded, to_host

__all__ = ["consider", "from_host", "launcher", "seeded", "to_host"]
