"""A pre-norm layer, as GPT-2 has it: dropout(mlp(norm(a))) + a of a = dropout(out(attention(norm(x)))) + x."""

from __future__ import annotations

from torch import Tensor

from fasttune import ops
from fasttune.patching.layers.captured import Captured


class PreNorm(Captured):
    def before(self, rows: Tensor) -> Tensor:
        return rows if self.norm1 is None else self.norm1(rows, self.backend)

    def finish(self, attended: Tensor, rows: Tensor, row_ids: Tensor | None) -> Tensor:
        projected, norm, backend = self.out(attended, row_ids), self.norm2, self.backend
        assert norm is not None
        if norm.fused:
            normed, after = ops.dropout_add_layer_norm(
                projected,
                rows,
                norm.weight,
                norm.bias,
                eps=norm.eps,
                dropout_p=self.dropouts[1],
                prenorm=True,
                row_ids=row_ids,
                backend=backend,
            )
        else:
            after = ops.dropout(projected, dropout_p=self.dropouts[1], residual=rows, row_ids=row_ids, backend=backend)
            normed = norm(after, backend)
        down = self.mlp(normed, row_ids)
        return ops.dropout(down, dropout_p=self.dropouts[3], residual=after, row_ids=row_ids, backend=backend)
