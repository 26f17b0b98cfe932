"""A post-norm layer, as BERT has it: norm(dropout(mlp(a)) + a) of a = norm(dropout(out(attention(x))) + x)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fasttune import ops
from fasttune.patching.layers.captured import Captured
from fasttune.patching.layers.frozen import Norm


class PostNorm(Captured):
    def finish(self, attended: Tensor, rows: Tensor, row_ids: Tensor | None) -> Tensor:
        after = self._norm(self.norm1, self.out(attended, row_ids), rows, self.dropouts[1], row_ids)
        return self._norm(self.norm2, self.mlp(after, row_ids), after, self.dropouts[3], row_ids)

    def _norm(self, norm: Norm | None, x: Tensor, residual: Tensor, p: float, row_ids: Tensor | None) -> Tensor:
        assert norm is not None
        if not norm.fused:
            return norm(ops.dropout(x, dropout_p=p, row_ids=row_ids, backend=self.backend) + residual, self.backend)
        options: dict[str, Any] = {"eps": norm.eps, "dropout_p": p, "row_ids": row_ids, "backend": self.backend}
        return ops.dropout_add_layer_norm(x, residual, norm.weight, norm.bias, **options)
