"""DiscoBox's contrastive loss on matches between objects (cells i of the query, j of m keys)."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from misa.ops.axes import check_shapes


def correspondence_loss(
    cosines: Float[Tensor, "m i j"],
    plan: Float[Tensor, "m i j"],
    *,
    form: Literal["official", "intended"] = "official",
    temperature: float = 0.07,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of every query cell's similarities against its match in the plan; 0 or more.

    "official" is DiscoBox's published code (Lan et al. 2021), a softmax of a softmax: with 7 x 7 cells its value stays
    between 3.858 and 3.905 for any features, so it teaches almost nothing. "intended" takes cosines / temperature as
    logits. The gradient flows through the cosines only.
    Raises ValueError: shapes differ, or an unknown form.
    """
    check_shapes("correspondence_loss", cosines=(cosines, "m i j"), plan=(plan, "m i j"))
    if form not in ("official", "intended"):
        raise ValueError(f"correspondence_loss knows the forms 'official' and 'intended', not {form!r}.")
    if cosines.numel() == 0:
        return cosines.sum()
    logits = cosines.softmax(dim=2) if form == "official" else cosines / temperature
    return F.cross_entropy(logits.flatten(0, 1), plan.argmax(dim=2).flatten())
