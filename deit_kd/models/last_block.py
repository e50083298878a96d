"""The last block of a ViT whose heads read tokens alone: behind its attention it computes those, and no patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

# The version of what a model computes for its heads. 2: no patches behind the attention of its last block.
VERSION = 2


class LastBlock(Block):
    """timm's block, which can leave out the patches after its attention; its parameters are those of `block`.

    The tokens are the same: behind its attention a block computes each by itself.

    Args:
        block: that it replaces.
    """

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.tokens: int | None = None  # how many it returns; None returns all
        self.train(block.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the tokens [B, N, D], or the first of them, for `x` [B, N, D]."""
        kept = slice(self.tokens)
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)[:, kept]
        x = x[:, kept] + self.drop_path1(self.ls1(attended))
        moved: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return moved


def replace_last_block(backbone: nn.Module) -> None:
    """Let `heads_alone` act on a model, if it is one of timm's ViTs whose class head reads its class token."""
    model: Any = backbone
    reads_a_token = isinstance(backbone, VisionTransformer) and model.global_pool == "token" and model.attn_pool is None
    if reads_a_token and len(model.blocks) and type(model.blocks[-1]) is Block:
        model.blocks[-1] = LastBlock(model.blocks[-1])


def computes_tokens_alone(backbone: nn.Module) -> bool:
    """Return whether `heads_alone` acts on a model."""
    model: Any = backbone
    last = model.blocks[-1] if isinstance(backbone, VisionTransformer) else None
    reads_patches = getattr(model, "answers_with_patches", False)
    return isinstance(last, LastBlock) and not model.grad_checkpointing and not reads_patches


@contextmanager
def heads_alone(backbone: nn.Module) -> Iterator[None]:
    """Meanwhile, let a model compute no more of its last features than the tokens that its heads read, if it can.

    Not if its heads read patches, nor where layers are computed again for their backward pass, which comes later.
    """
    model: Any = backbone
    if not computes_tokens_alone(backbone):
        yield
        return
    last = model.blocks[-1]
    last.tokens = model.num_prefix_tokens
    try:
        yield
    finally:
        last.tokens = None
