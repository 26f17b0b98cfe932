"""A bias of attention's scores by the distance of query and key, as a table, in place of the tensor (B, H, S, S) that
stock writes down for all layers: whoever reads it gets that tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.patching.promises.later import Later


class DistanceBias(Later):
    """table: (H, 2 S - 1), of key - query from 1 - S to S - 1."""

    table: Tensor

    @staticmethod
    def by(table: Tensor, rows: int) -> DistanceBias:
        """For a batch of `rows` rows of S tokens."""
        length = (table.shape[1] + 1) // 2

        def written() -> Tensor:
            tokens = torch.arange(length, device=table.device)
            with torch.inference_mode(table.is_inference()), torch.set_grad_enabled(table.requires_grad):
                whole = table[:, tokens - tokens[:, None] + length - 1].expand(rows, -1, -1, -1)
                return whole.clone(memory_format=torch.contiguous_format)

        shape = (rows, table.shape[0], length, length)
        bias: Any = Later.of(written, shape, table.dtype, table.device, DistanceBias)
        bias.table = table
        return bias

    @property
    def as_table(self) -> bool:
        """Whether it is still what the table says: nobody has written into what he read."""
        return self.value is None or self.value.is_inference() or self.value._version == 0
