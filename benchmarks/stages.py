"""The stages of the losses at training size: `benchmarks.launches` counts their launches, `benchmarks.gpu` times them.

Axes: b image (2) · n mask · c category · d channel · h row · w column.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from misa.experiment import Affinity
from misa.losses.distillation import distillation_loss
from misa.losses.inputs import Batch, Positives, SemanticPrior
from misa.losses.pairwise import pairwise_loss
from misa.losses.projection import projection_loss
from misa.objectives.base import BoxObjective, Detected, Step, Truth
from misa.objectives.box2mask import Box2Mask
from misa.objectives.boxinst import BoxInst
from misa.objectives.boxlevelset import BoxLevelSet
from misa.objectives.boxteacher import BoxTeacher
from misa.objectives.discobox import DiscoBox
from misa.objectives.sim import SIM
from misa.ops.affinity import Sigma
from misa.ops.guides import GlobalForm, Guides, Join
from misa.ops.tree import Trees

OBJECTIVES: dict[str, BoxObjective] = {
    "BoxInst": BoxInst(),
    "BoxLevelSet": BoxLevelSet(),
    "Box2Mask": Box2Mask(),
    "DiscoBox": DiscoBox(),
    "SIM": SIM(),
    "BoxTeacher": BoxTeacher(),
}
READERS = ("SIM", "BoxTeacher")  # read values on the host, which fake tensors do not have


@dataclass(frozen=True)
class Problem:
    """Inputs of the losses for a batch of two images; `labels` and `image` (n) are on the host."""

    logits: Tensor  # n h w
    boxes: Tensor  # n h w, bool
    images: Tensor  # b 3 h w
    teacher: Tensor  # S, b d h w
    factors: Tensor  # K, c d
    student: Tensor  # I after its adapter, b d h w
    structure: Tensor  # b 5 h w
    valid: Tensor  # b h w, bool
    labels: Tensor
    image: Tensor

    def to(self, device: str) -> "Problem":
        """Return the problem on a device; `labels` and `image` stay on the host."""
        there = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in ("labels", "image")}
        return replace(self, **there)


def hosted(n: int, categories: int) -> tuple[Tensor, Tensor]:
    """Return labels and image indices for n masks per image."""
    return torch.arange(2 * n) % categories, torch.tensor([0] * n + [1] * n)


def drawn(n: int, categories: int, size: tuple[int, int], channels: int) -> Problem:
    """Return a smooth problem from a fixed seed, on the CPU: boxes of a ninth of the map, one image with padding."""
    rng, (h, w) = torch.Generator().manual_seed(0), size

    def smooth(*shape: int) -> Tensor:
        coarse = torch.randn(*shape, -(-h // 4), -(-w // 4), generator=rng)
        return torch.nn.functional.interpolate(coarse, size, mode="bilinear")

    boxes = torch.zeros(2 * n, h, w, dtype=torch.bool)
    for i, box in enumerate(boxes):
        top, left = i * 7 % (h // 2), i * 5 % (w // 2)
        box[top : top + h // 3, left : left + w // 3] = True
    valid = torch.ones(2, h, w, dtype=torch.bool)
    valid[1, :, -(w // 20) :] = False
    return Problem(
        smooth(1, 2 * n)[0],
        boxes,
        smooth(2, 3),
        smooth(2, channels).relu(),
        torch.randn(categories, channels, generator=rng),
        smooth(2, channels),
        smooth(2, 5),
        valid,
        *hosted(n, categories),
    )


def union(problem: Problem) -> Tensor:
    """Return the union of each image's boxes (b 1 h w)."""
    n = len(problem.boxes) // 2
    return problem.boxes.unflatten(0, (2, n)).any(dim=1)[:, None]


def sepa(problem: Problem, masks: Tensor, form: GlobalForm = "sum") -> dict[str, Tensor]:
    """Return MISA's pairwise loss, by term."""
    return pairwise_loss(
        masks,
        problem.boxes,
        problem.images,
        problem.image,
        affinity=Affinity(saliency=True, global_form=form, local_form="product" if form == "product" else "sum"),
        labels=problem.labels,
        prior=SemanticPrior(problem.teacher, problem.factors),
        valid=problem.valid,
    )


def fsd(problem: Problem, student: Tensor) -> Tensor:
    """Return MISA's distillation loss."""
    return distillation_loss(student, problem.teacher, union(problem), valid=problem.valid[:, None])


def stages(problem: Problem, form: GlobalForm = "sum", sigma: Sigma = "image") -> dict[str, Callable[[], Any]]:
    """Return the stages of MISA's forward pass as functions, to be called in this order."""
    guides = Guides(
        problem.images,
        problem.image.tolist(),
        problem.teacher,
        problem.factors,
        problem.labels.tolist(),
        ("color", "saliency"),
        problem.valid,
        window=5,
    )
    masks, boxes, join, kept = problem.logits.sigmoid(), problem.boxes.float(), Join(form=form), dict[str, Any]()
    near = Join(form="sum" if form == "sum" else "product", sigma=sigma)

    def trees() -> Trees:
        kept["trees"] = guides.trees(ahead=join)
        return kept["trees"]

    def first() -> Tensor:
        kept["first"] = guides.along_trees(masks, kept["trees"], 0.01, join)
        return kept["first"]

    return {
        "distances and spread of S": lambda: guides.second_on_edges,
        "trees": trees,
        "pass 1": first,
        "pass 2": lambda: guides.along_masks(kept["first"], kept["first"][:, None], kept["trees"], 0.07),
        "window": lambda: guides.along_window(masks, boxes, window=5, bandwidth=0.15, steps=20, join=near),
        "projection": lambda: projection_loss(masks, problem.boxes).sum(),
        "FSD": partial(fsd, problem, problem.student),
    }


def step_of(problem: Problem, objective: BoxObjective) -> Step:
    """Return a late training step with all inputs of an objective; the EMA model's outputs equal the student's."""
    h, w = problem.logits.shape[-2:]
    boxes = torch.tensor([[0.0, 0, w, h]]).repeat(len(problem.labels), 1)
    own = Positives(problem.logits, problem.boxes, problem.labels, problem.image, torch.arange(len(problem.labels)))
    parts = problem.logits.sigmoid().detach().chunk(2)
    scores = [torch.full((len(x),), 0.9, device=x.device) for x in parts]
    return Step(
        own,
        Batch(problem.images, problem.valid),
        iteration=10**6 - 1,
        total=10**6,
        features=problem.student,
        union=union(problem),
        known=union(problem),
        truth=Truth(boxes, problem.labels, problem.image),
        colors=problem.images.sigmoid() * 255,
        shadow=own,
        shadow_features=problem.student,
        detections=[
            Detected(torch.full((len(x), 4), 4.0, device=x.device), score, x)
            for x, score in zip(parts, scores, strict=True)
        ]
        if objective.needs.detections
        else None,
        structure=problem.structure,
        generators=[torch.Generator().manual_seed(b) for b in range(2)],
    )


def objective_loss(problem: Problem, name: str) -> Callable[[], Tensor]:
    """Return a function that sums an objective's terms, with DiscoBox's gate open."""
    objective = OBJECTIVES[name]
    memory = objective.memory(len(problem.factors), problem.student.shape[1])
    if memory is not None:
        memory.to(problem.logits.device)
        for buffer_name, buffer in memory.named_buffers():
            if buffer_name == "running":
                buffer.zero_()
    step = step_of(problem, objective)

    def loss() -> Tensor:
        return torch.stack([term.loss for term in objective.losses(step, memory).values()]).sum()

    return loss
