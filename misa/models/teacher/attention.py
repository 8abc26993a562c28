"""SeMask's semantic attention block (Jain et al. 2023): self-attention whose queries and keys are class scores.

Axes: b image · d channel · n class · h row · w column · p position in a window.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Residual = Literal["input", "norm"]


class SemanticAttention(nn.Module):
    """out = base + γ · dropout(R(softmax(Q Kᵀ) V)) on tokens y = LayerNorm(x); also returns the class scores Q.

    The softmax is not scaled by 1/sqrt(d); the inner dimension is the number of classes. γ starts at 0.

    classes: channels of Q and K, background included.
    window: side of the non-overlapping windows within which tokens attend; None attends over the whole map. Maps are
        padded with zero tokens to whole windows; these attend with the biases of K and V, as in SeMask.
    residual: "input": the base is x, so that γ = 0 is the identity and a pretrained network is unchanged at first
        (ours, for ResNet); "norm": the base is y, as published for Swin.
    """

    def __init__(
        self, channels: int, classes: int, *, window: int | None = 7, residual: Residual = "input", dropout: float = 0.1
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"SemanticAttention needs a window of one token or more, or None: window is {window}.")
        if residual not in ("input", "norm"):
            raise ValueError(f"SemanticAttention has residual 'input' or 'norm': residual is {residual!r}.")
        self.window, self.residual = window, residual
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, classes)
        self.key = nn.Linear(channels, classes)
        self.value = nn.Linear(channels, channels)
        self.project = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.gamma = nn.Parameter(torch.zeros(1))
        for layer in (self.query, self.key, self.value, self.project):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attended map (b d h w) and the class scores (b n h w) of a stage's map (b d h w)."""
        h, w = x.shape[-2:]
        tokens = x.permute(0, 2, 3, 1)
        y = self.norm(tokens)
        windows = self._split(y)
        scores = self.query(windows)
        mixed = F.scaled_dot_product_attention(scores, self.key(windows), self.value(windows), scale=1.0)
        update = self._join(self.dropout(self.project(mixed)), h, w)
        base = tokens if self.residual == "input" else y
        out = base + self.gamma * update
        return out.permute(0, 3, 1, 2).contiguous(), self._join(scores, h, w).permute(0, 3, 1, 2).contiguous()

    def _split(self, tokens: Tensor) -> Tensor:
        """Partition tokens (b h w d) into windows (b, windows, p, d)."""
        b, h, w, d = tokens.shape
        if self.window is None:
            return tokens.reshape(b, 1, h * w, d)
        side = self.window
        tokens = F.pad(tokens, (0, 0, 0, -w % side, 0, -h % side))
        grid = tokens.view(b, tokens.shape[1] // side, side, tokens.shape[2] // side, side, d)
        return grid.transpose(2, 3).reshape(b, -1, side * side, d)

    def _join(self, windows: Tensor, h: int, w: int) -> Tensor:
        """Merge windows (b, windows, p, d) into tokens (b h w d) and remove padding."""
        b, _, _, d = windows.shape
        if self.window is None:
            return windows.reshape(b, h, w, d)
        side = self.window
        rows, columns = -(-h // side), -(-w // side)
        grid = windows.view(b, rows, columns, side, side, d).transpose(2, 3)
        return grid.reshape(b, rows * side, columns * side, d)[:, :h, :w]
