"""The step on arrays that are sharded over several devices: each shard of the state is updated where it is.

Heads and channels may be sharded, and sequences with their slots where sequence i has slot i. The other arrays go where
the state needs them; the state does not move.
"""
