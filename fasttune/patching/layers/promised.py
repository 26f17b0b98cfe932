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
from fasttune.patching.layers.relative import ByDistance
from fasttune.patching.padding.layout import Layout
from fasttune.patching.promises.distances import DistanceBias


class PromisedLayer(Patched):
    captured: type[Captured] = PostNorm
    both_real = False  # the pattern of its mask, as `layout_of` has it

    def attends(self) -> Any:
        """The module that attends, None where something else stands in its place."""
        raise NotImplementedError

    def described(self, attention: Any) -> Any:
        """What says how it attends: is_causal, config."""
        return attention

    def heads(self, attention: Any) -> tuple[int, int]:
        """How many there are, and how wide."""
        return attention.num_attention_heads, attention.attention_head_size

    def parts(self, positions: Any = None) -> Parts:
        """positions: cos and sin, a bias by distance or relative positions that the layer was called with."""
        raise NotImplementedError

    def window(self) -> int | None:
        """How far a token sees, if the mask says so too."""
        return None

    def promised(
        self, hidden_states: Any, mask: Any, arguments: Mapping[str, Any], positions: Any = None
    ) -> tuple[Tensor | None, Any]:
        """(a promise of the output, or None where the layer has to run as it stands; the mask to hand it then).

        arguments: what else the layer was called with and nothing here knows of. positions: see `parts`."""
        attention = self.attends()
        if attention is None:
            return None, mask
        described, (heads, head_dim) = self.described(attention), self.heads(attention)
        out = promise(
            self,
            lambda layout: self._capture(hidden_states, head_dim, positions, layout),
            hidden_states,
            mask,
            attention=described,
            heads=heads,
            head_dim=head_dim,
            arguments=arguments,
            window=self.window(),
            by_distance=isinstance(positions, (DistanceBias, ByDistance)),
            both_real=self.both_real,
        )
        return out, mask if out is not None else mask_for_stock(hidden_states, mask, described, arguments)

    def _capture(self, hidden_states: Tensor, head_dim: int, positions: Any, layout: Layout) -> Captured:
        if isinstance(positions, tuple) and not Rotary.fits(positions, hidden_states, head_dim):
            raise Unknown("position embeddings of another shape")
        if isinstance(positions, DistanceBias) and positions.shape[-1] != hidden_states.shape[1]:
            raise Unknown("a bias by distance of another length")
        try:
            parts = self.parts(positions)
        except AttributeError as error:  # a module of another kind stands where a part is looked for
            raise Unknown(str(error)) from None
        return self.captured(self, parts, layout)


class PromisedEncoderLayer(PromisedLayer):
    """One that is called with hidden states and a mask alone."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        out, attention_mask = self.promised(hidden_states, attention_mask, kwargs)
        if out is None:
            hidden_states, attention_mask = ordinary(hidden_states, attention_mask)
            out = super().forward(hidden_states, attention_mask, **kwargs)
        return out
