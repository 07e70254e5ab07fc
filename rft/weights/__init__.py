"""Policy weights on their way from the learner to every engine.

The learner publishes a handle, which travels as an argument of a call and is loaded by each engine:

- `shared`: one host's memory, which every process of it maps; `delta`: over that, what changed.
- `device`: from GPU to GPU, by CUDA IPC or NCCL.
- `packed`: a buffer of one's own, where there is only one process.

What arrives through memory is hashed (xxh3-128, layout included) before one parameter changes.
"""

from rft.weights.base import DeviceWeights, Weights, check_fit, copy_into, overwrite
from rft.weights.layout import ALIGNMENT, DTYPES, Layout
from rft.weights.packed import PackedWeights, pack

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "DeviceWeights",
    "Layout",
    "PackedWeights",
    "Weights",
    "check_fit",
    "copy_into",
    "overwrite",
    "pack",
]
