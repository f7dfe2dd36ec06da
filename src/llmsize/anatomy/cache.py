"""What the layers of a model keep of the tokens that they have seen."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["full", "window", "latent", "index", "cross", "recurrent", "none"]
"""Every token; the last `window` tokens; one compressed vector per token; the key by which an
indexer chooses tokens; the encoder's tokens; a state whose size does not depend on the tokens;
nothing."""


class LayerCache(NamedTuple):
    """What one layer keeps."""

    kind: Kind
    kv_heads: int = 0
    """Heads of keys and values; 1 for a latent."""
    key_dim: int = 0
    """Channels of one head's key; for a latent its rank and the shared rotary key."""
    value_dim: int = 0
    """Channels of one head's value; 0 for a latent, whose value is part of it."""
    window: int = 0
    """Tokens that a window layer attends to."""
    every: int = 1
    """Tokens that are compressed into one entry."""
    waiting: int = 0
    """Elements of a token that waits for others to be compressed with."""
    expanded: int = 0
    """Elements per token where an engine caches a latent's decompressed keys and values, or those
    of every query head."""
    state: int = 0
    """Elements of a recurrent layer's state (convolution and recurrence) for one sequence."""
