"""The key/value cache: what attention needs to remember about the tokens read so far.

Decoding one token needs the keys and values of all earlier tokens. These never change, so they are computed
once and kept. Memory is allocated ahead and written by index; growing it with `torch.cat` would copy
everything for every token.

A slot is a position: token number p of a row is in slot p, and padding is never written. So a left-padded, a
right-padded and an unpadded row leave the same cache, and rows may differ in length.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for a batch of rows.

    Args:
        num_layers, batch_size, num_key_value_heads, head_dim: the shape of what is kept.
        dtype, device: those of the model.
        step: slots are allocated in multiples of this number and at least doubled each time, so that the
            total cost of copying stays linear in the number of tokens.

    Use: `position_ids = cache.reserve(attention_mask)` once per forward pass, then
    `keys, values = cache.write(layer, keys, values)` in every layer.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        step: int = 256,
    ) -> None:
        self.step = step
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens held, per row
        empty = (batch_size, num_key_value_heads, 0, head_dim)
        self.keys = [torch.zeros(empty, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(empty, dtype=dtype, device=device) for _ in range(num_layers)]
        self._used = 0  # slots in use: the length of the longest row
        self._rows = self._columns = self._slots = self.lengths[:0]
        self._same: slice | None = None  # the slots of every row, if they are the same

    @property
    def capacity(self) -> int:
        """Slots allocated so far."""
        return self.keys[0].shape[2]

    def reserve(self, attention_mask: Tensor) -> Tensor:
        """Reserve slots for the real tokens of new input, and number them.

        Args:
            attention_mask: [B, T], 1 for a token, 0 for padding (a finished row is all padding).

        Returns:
            position_ids [B, T]. Padding gets the position of the token before it (at least 0), which is
            harmless: it is never written and its output is never read.
        """
        mask = attention_mask.bool()
        counts = mask.cumsum(dim=1)
        position_ids = (self.lengths[:, None] + counts - 1).clamp(min=0)
        self._rows, self._columns = mask.nonzero(as_tuple=True)
        self._slots = position_ids[self._rows, self._columns]
        self.lengths = self.lengths + counts[:, -1]
        self._used = int(self.lengths.max())
        same = bool(mask.all() & (self.lengths == self._used).all())
        self._same = slice(self._used - mask.shape[1], self._used) if same else None
        if self._used > self.capacity:
            slots = max(self._used, 2 * self.capacity)
            self._grow(-(-slots // self.step) * self.step)
        return position_ids

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, K, T, Dh] of the reserved tokens.

        Returns:
            All keys and values so far, [B, K, S, Dh], as views. Slots beyond a row's length hold stale
            values: mask them with `key_is_real`.
        """
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if self._same is not None:  # neighbors are copied several times as fast as by index
                store[:, :, self._same] = new
            else:
                store[self._rows, :, self._slots] = new[self._rows, :, self._columns]
        return self.keys[layer][:, :, : self._used], self.values[layer][:, :, : self._used]

    @property
    def key_positions(self) -> Tensor:
        """[1, S]: slot number = position."""
        return torch.arange(self._used, device=self.lengths.device)[None]

    @property
    def key_is_real(self) -> Tensor:
        """[B, S]: which slots hold a token of their row."""
        return self.key_positions < self.lengths[:, None]

    def reset(self) -> None:
        """Forget all tokens, but keep the memory."""
        self.lengths = torch.zeros_like(self.lengths)
        self._used = 0

    def _grow(self, capacity: int) -> None:
        for stores in (self.keys, self.values):
            for layer, old in enumerate(stores):
                new = old.new_zeros(old.shape[0], old.shape[1], capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                stores[layer] = new
