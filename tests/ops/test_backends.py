"""Both backends of the CPU, compiled loops and torch operations, against each other on random scenes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from misa.ops.backends.choice import use
from misa.ops.guides import Guides, Join
from misa.ops.propagation import SemanticGuide, propagate_pamr

SCENES = 100


class Case:
    """A random batch of one or two images with masks, boxes, features, categories and padding, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rng = rng
        generator = torch.Generator().manual_seed(seed)
        b, h, w, n = (int(rng.integers(low, high)) for low, high in ((1, 3), (1, 40), (1, 60), (1, 7)))
        d, e, c = (int(rng.integers(low, high)) for low, high in ((1, 5), (1, 40), (1, 4)))
        guides = torch.rand(b, d, h, w, generator=generator)
        if seed % 3 == 0:  # ties and flat zones
            guides = (guides * 3).round() / 3
        features = torch.randn(b, e, h, w, generator=generator) + float(rng.choice([0.0, 5.0]))
        self.masks = torch.rand(n, h, w, generator=generator)
        self.boxes = None if seed % 5 == 0 else self._boxes(n, h, w, fractional=seed % 7 == 0)
        valid = torch.ones(b, h, w, dtype=torch.bool)
        valid[-1, h - int(rng.integers(0, h // 2 + 1)) :] = False
        valid[-1, :, w - int(rng.integers(0, w // 2 + 1)) :] = False
        image = [int(i) for i in rng.integers(0, b, n)]
        labels = [int(i) for i in rng.integers(0, c, n)]
        teacher = {}
        if seed % 4:
            kernels = ("color", "saliency" if seed % 6 else "feature")
            factors = torch.randn(c, e, generator=generator)
            teacher = {"features": features, "factors": factors, "labels": labels, "kernels": kernels}
        self.guides = Guides(guides, image, valid=valid if seed % 2 else None, **teacher)
        self.bandwidth = float(rng.choice([0.02, 0.2, 1.0]))
        self.balance = float(rng.choice([0.0, 0.7, 2.0]))
        self.sigma = [1.0, "image", 0.3][seed % 3]
        self.form = ["sum", "embedding", "product"][seed % 3]
        self.tie_rule = ["exact", "official"][seed % 2]
        self.window = [1, 3, 5, 7][seed % 4]
        self.guides.window = self.window

    def _boxes(self, n: int, h: int, w: int, *, fractional: bool) -> torch.Tensor:
        boxes = torch.zeros(n, h, w)
        for box in boxes[: max(1, n - 1)]:  # one is empty
            top, left = self.rng.integers(0, h), self.rng.integers(0, w)
            box[top : self.rng.integers(top + 1, h + 1), left : self.rng.integers(left + 1, w + 1)] = 1
        return boxes * 0.6 if fractional else boxes

    def run(self) -> dict[str, torch.Tensor]:
        """Returns all results of the backend."""
        guides = replace(self.guides)  # without cached results of the other backend
        trees = guides.trees(self.tie_rule)
        found = {name: getattr(trees, name).sort(dim=1).values for name in ("edge", "length")}  # in any order
        join = Join(self.balance, "sum", self.sigma, 0.8)
        form = replace(join, form=self.form)
        found["first"] = guides.along_trees(self.masks, trees, self.bandwidth, form, tie_rule=self.tie_rule)
        found["second"] = guides.along_masks(found["first"], found["first"][:, None], guides.cut(trees), 0.3)
        window = {"window": self.window, "bandwidth": self.bandwidth, "steps": 4}
        found["window"] = guides.along_window(self.masks, self.boxes, **window, join=join)
        if self.sigma == "image":
            found["product"] = guides.along_window(self.masks, self.boxes, **window, join=replace(join, form="product"))
            found["spread"] = guides.along_window(self.masks, self.boxes, **window, join=replace(join, sigma="window"))
        if guides.second:
            found["lengths"], found["variance"] = guides.second_on_edges
            found["pamr"] = propagate_pamr(
                self.masks,
                guides.images[0],
                box_masks=self.boxes,
                semantic=SemanticGuide(guides.features[0], guides.factors),
                labels=torch.tensor(guides.labels),
                balance=self.balance,
                valid=None if guides.valid is None else guides.valid[0],
            )
        return found


@pytest.mark.parametrize("seed", range(SCENES))
def test_both_backends_agree(seed):
    case, found = Case(seed), {}
    for name in ("cpu", "torch"):
        with use(name):
            found[name] = case.run()
    for name, expected in found["torch"].items():
        exact = {"atol": 0, "rtol": 0}
        loose = {"atol": 1e-4, "rtol": 1e-4} if name in ("lengths", "variance") else {"atol": 1e-5, "rtol": 1e-5}
        assert_close(found["cpu"][name], expected, **(loose if expected.is_floating_point() else exact), msg=name)
