"""BoxInst's pairwise loss: similar neighbors should get the same label.

Axes: n instance · k neighbor · h row · w column, neighbors as `window_offsets(window, dilation)`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from misa.ops.affinity import check_finite, promote
from misa.ops.axes import check_shapes
from misa.ops.neighbors import shift, window_offsets


def edge_error(mask_logits: Float[Tensor, "n h w"], *, window: int = 3, dilation: int = 2) -> Float[Tensor, "n k h w"]:
    """Return −log P(y_i = y_k) = −log(p_i p_k + (1 − p_i)(1 − p_k)) for every neighbor k; 0 or more.

    BoxInst (Tian et al. 2021, Eq. 3 and 4), in log space so that confident masks neither overflow nor lose the
    gradient. A neighbor outside the image has error 0.
    Raises ValueError: the shape is not (n, h, w); NotFinite: NaN or Inf, on the CPU only.
    """
    check_shapes("edge_error", mask_logits=(mask_logits, "n h w"))
    check_finite("edge_error: mask_logits", mask_logits)
    logits = promote(mask_logits)
    log_in, log_out = F.logsigmoid(logits), F.logsigmoid(-logits)
    planes = []
    for offset in window_offsets(window, dilation):
        planes.append(-torch.logaddexp(log_in + shift(log_in, offset), log_out + shift(log_out, offset)))
    return torch.stack(planes, dim=1)


def pair_loss(
    error: Float[Tensor, "n k h w"], keep: Bool[Tensor, "n k h w"], *, reduction: Literal["ratio", "positive"] = "ratio"
) -> Float[Tensor, ""] | Float[Tensor, " n"]:
    """Return the mean error over the kept pairs, of all instances ("ratio", a scalar) or of each ("positive", n).

    BoxInst and SIM take one ratio, Σ error · keep / max(Σ keep, 1), in which large objects weigh more; BoxTeacher's
    affinity term takes one per positive. Without kept pairs it is 0, still attached to the graph.
    """
    check_shapes("pair_loss", error=(error, "n k h w"), keep=(keep, "n k h w"))
    if reduction not in ("ratio", "positive"):
        raise ValueError(f"pair_loss knows the reductions 'ratio' and 'positive', not {reduction!r}.")
    kept = keep.to(error.dtype)
    if reduction == "ratio":
        return (error * kept).sum() / kept.sum().clamp(min=1)
    return (error * kept).sum(dim=(1, 2, 3)) / kept.sum(dim=(1, 2, 3)).clamp(min=1)
