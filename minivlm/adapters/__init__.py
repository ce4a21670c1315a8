"""Low-rank adapters: small files that teach a large model something, in the form of the package peft."""

from minivlm.adapters.config import LoraConfig
from minivlm.adapters.folders import read_adapter
from minivlm.adapters.merging import merge, merge_for_good, unmerge
from minivlm.adapters.put_on import Adapter, new_adapter, put_on, switch_to, take_off

__all__ = [
    "Adapter",
    "LoraConfig",
    "merge",
    "merge_for_good",
    "new_adapter",
    "put_on",
    "read_adapter",
    "switch_to",
    "take_off",
    "unmerge",
]
