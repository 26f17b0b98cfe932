"""Which elements each backend's dropout keeps.

TRITON_INTERPRET=1 python tests/cuda_host/masks.py FILE: those of Triton, whose interpreter needs a process of its own.
"""

import sys

import torch
from torch import Tensor

from fasttune.ops._attention_call import Call
from fasttune.ops.attention import _attention
from fasttune.ops.dropout import _dropout


def masks(backend: str) -> list[Tensor]:
    """Of the elementwise generator and of attention's: there, equal scores and a one-hot value for each key show it."""
    seed = torch.tensor([-(2**61) + 9])
    elements = _dropout(torch.ones(33, 261), None, None, seed, 0.1, backend)
    equal, one_hot = torch.zeros(1, 120, 2, 128), torch.eye(120, 128).view(1, 120, 1, 128).expand(1, 120, 2, 128)
    call = Call(seed=seed, dropout_p=0.3)
    attended, _ = _attention._run(equal, equal, one_hot.contiguous(), *call, backend)
    return [elements != 0, attended != 0]


if __name__ == "__main__":
    torch.save(masks("triton"), sys.argv[1])
