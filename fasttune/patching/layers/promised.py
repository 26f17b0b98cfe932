"""A layer that hands out a promise of its output where it is known through and through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fasttune.patching.layers.captured import Captured, Parts
from fasttune.patching.layers.entry import mask_for_stock, ordinary, promise
from fasttune.patching.layers.frozen import Unknown
from fasttune.patching.layers.patched import Patched
from fasttune.patching.layers.post_norm import PostNorm
from fasttune.patching.layers.projections import Rotary


class PromisedLayer(Patched):
    captured: type[Captured] = PostNorm

    def attends(self) -> Any:
        """The module that attends, None where something else stands in its place."""
        raise NotImplementedError

    def heads(self, attention: Any) -> tuple[int, int]:
        """How many there are, and how wide."""
        return attention.num_attention_heads, attention.attention_head_size

    def parts(self, position_embeddings: Any = None) -> Parts:
        """position_embeddings: cos and sin that the layer was called with."""
        raise NotImplementedError

    def window(self) -> int | None:
        """How far a token sees, if the mask says so too."""
        return None

    def promised(
        self, hidden_states: Any, mask: Any, arguments: Mapping[str, Any], position_embeddings: Any = None
    ) -> tuple[Tensor | None, Any]:
        """(a promise of the output, or None where the layer has to run as it stands; the mask to hand it then).

        arguments: what else the layer was called with and nothing here knows of."""
        attention = self.attends()
        if attention is None:
            return None, mask
        heads, head_dim = self.heads(attention)
        out = promise(
            self,
            lambda: self._capture(hidden_states, head_dim, position_embeddings),
            hidden_states,
            mask,
            attention=attention,
            heads=heads,
            head_dim=head_dim,
            arguments=arguments,
            window=self.window(),
        )
        return out, mask if out is not None else mask_for_stock(hidden_states, mask, attention, arguments)

    def _capture(self, hidden_states: Tensor, head_dim: int, position_embeddings: Any) -> Captured:
        if position_embeddings is not None and not Rotary.fits(position_embeddings, hidden_states, head_dim):
            raise Unknown("position embeddings of another shape")
        try:
            parts = self.parts(position_embeddings)
        except AttributeError as error:  # a module of another kind stands where a part is looked for
            raise Unknown(str(error)) from None
        return self.captured(self, parts)


class PromisedEncoderLayer(PromisedLayer):
    """One that is called with hidden states and a mask alone."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        out, attention_mask = self.promised(hidden_states, attention_mask, kwargs)
        if out is None:
            hidden_states, attention_mask = ordinary(hidden_states, attention_mask)
            out = super().forward(hidden_states, attention_mask, **kwargs)
        return out
