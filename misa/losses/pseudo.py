"""Losses against pseudo masks: Dice loss, and focal loss on selected pixels.

Half precision is computed in float32: float16 cannot count the pixels of a large mask.

Axes: n instance.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from misa.ops.affinity import check_probabilities, promote


def dice(a: Float[Tensor, "n ..."], b: Float[Tensor, "n ..."], eps: float = 1e-5) -> Float[Tensor, " n"]:
    """Return the Dice loss 1 − 2 Σ a b / (Σ a² + Σ b² + eps) of each instance; in [0, 1] for values in [0, 1].

    Milletari et al. 2016 with squared denominators, as in BoxInst, DiscoBox (eps 2e-3 in total) and BoxTeacher. Two
    empty masks cost 1: leave such pairs out.
    Raises ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"dice needs two maps of one shape: they are {tuple(a.shape)} and {tuple(b.shape)}.")
    a, b = promote(a).flatten(1), promote(b).flatten(1)
    return 1 - 2 * (a * b).sum(1) / ((a * a).sum(1) + (b * b).sum(1) + eps)


def quality(masks: Float[Tensor, "n h w"]) -> Float[Tensor, " n"]:
    """Return each mask's confidence: the mean probability of its pixels above 0.5, 0 if there are none.

    BoxTeacher (Cheng et al. 2023) weights its pseudo masks and its predictions' scores with it.
    """
    masks = promote(masks)
    sure = (masks > 0.5).to(masks.dtype)
    return (masks * sure).sum(dim=(1, 2)) / (sure.sum(dim=(1, 2)) + 1e-6)


def focal_on(
    probabilities: Float[Tensor, "n ..."],
    target: Bool[Tensor, "n ..."],
    weight: Float[Tensor, "n ..."] | Bool[Tensor, "n ..."],
    *,
    form: Literal["official", "intended"] = "official",
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Return the focal loss Σ weight · α_t · BCE · (1 − p_t)^γ / (Σ weight + 1), 0 or more (Lin et al. 2017).

    "official" is SIM's published code (Li et al. 2023): p_t is right, but the cross-entropy treats the probability as a
    logit, so BCE = softplus(−p) in the mask and softplus(p) outside: bounded, with a gradient of the right sign.
    "intended" is −log p_t.
    Raises ValueError: shapes differ, or an unknown form; on the CPU also for values outside [0, 1], such as logits.
    """
    if probabilities.shape != target.shape or probabilities.shape != weight.shape:
        raise ValueError(
            "focal_on needs probabilities, target and weight of one shape: they are "
            f"{tuple(probabilities.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}."
        )
    if form not in ("official", "intended"):
        raise ValueError(f"focal_on knows the forms 'official' and 'intended', not {form!r}.")
    check_probabilities("focal_on: probabilities", probabilities)
    p = promote(probabilities)
    p_t = torch.where(target, p, 1 - p)
    if form == "official":
        error = F.softplus(torch.where(target, -p, p))
    else:
        error = -p_t.clamp(min=torch.finfo(p.dtype).tiny).log()
    alpha_t = torch.where(target, alpha, 1 - alpha).to(p.dtype)
    chosen = weight.to(p.dtype)
    return (chosen * alpha_t * error * (1 - p_t) ** gamma).sum() / (chosen.sum() + 1)
