"""SIM: pseudo masks from the EMA copy and prototypes, the pixels that they supervise, and prototype updates."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch.testing import assert_close

from misa.losses.inputs import Batch, Positives
from misa.losses.pseudo import focal_on
from misa.objectives.base import Ramp, Step, Truth
from misa.objectives.sim import SIM, objects_of
from misa.ops.boxes import extents
from misa.ops.paste import Picture
from misa.ops.strong import denormalised, normalised

H, W, D, C = 8, 9, 4, 3
OBJECTIVE = SIM(ramp=Ramp(0, 100), pseudo_start=Ramp(10, 10), pseudo_ramp=Ramp(0, 100), bottom_rows=0, prototypes=5)


@pytest.fixture
def step(rng):
    """Three objects in two images; the first has two positives, the middle one none."""
    instance, labels = torch.tensor([2, 0, 0]), torch.tensor([1, 2, 2])
    boxes = torch.zeros(3, H, W, dtype=torch.bool)
    boxes[0, 1:7, 2:8] = True
    boxes[1:, 2:6, 0:5] = True
    own = Positives(
        torch.randn(3, H, W, generator=rng).requires_grad_(), boxes, labels, torch.tensor([1, 0, 0]), instance
    )
    return Step(
        own,
        Batch(torch.randn(2, 3, H, W, generator=rng), torch.ones(2, H, W, dtype=torch.bool)),
        iteration=50,
        total=100,
        features=torch.randn(2, D, H, W, generator=rng),
        colors=255 * torch.rand(2, 3, H, W, generator=rng),
        shadow=own._replace(mask_logits=3 * torch.randn(3, H, W, generator=rng)),
        shadow_features=torch.randn(2, D, H, W, generator=rng),
        generators=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
    )


@pytest.fixture
def memory(rng):
    own = OBJECTIVE.memory(C, D)
    own.prototypes.copy_(torch.randn(own.prototypes.shape, generator=rng))
    return own


def test_an_object_is_the_mean_of_its_instances(step):
    objects = objects_of(step)
    masks = step.shadow.mask_logits.sigmoid()
    assert objects.instances.tolist() == [2, 1]
    assert_close(objects.masks, torch.stack([(masks[1] + masks[2]) / 2, masks[0]]))
    assert objects.labels.tolist() == [2, 1]
    assert objects.image.tolist() == [0, 1]
    assert objects.where.tolist() == [1, 0, 0]
    assert torch.equal(objects.boxes, step.positives.box_masks[[1, 0]])


def test_neighbors_are_alike_in_color_and_feature(step):
    """With a constant color the features decide, at a distance of 2.3 for the threshold of 0.1."""
    grey = step._replace(colors=torch.full_like(step.colors, 90.0))
    found, features = OBJECTIVE.likeness(grey), step.shadow_features
    for y in range(H):
        for x in range(W):
            for k, (dy, dx) in enumerate((a, b) for a in (-2, 0, 2) for b in (-2, 0, 2) if (a, b) != (0, 0)):
                there = 0 <= y + dy < H and 0 <= x + dx < W
                distance = float((features[0, :, y, x] - features[0, :, y + dy, x + dx]).norm()) if there else math.inf
                assert found[0, k, y, x].item() == pytest.approx(math.exp(-distance), abs=1e-5)
    assert math.exp(-2.3) == pytest.approx(OBJECTIVE.similarity, abs=1e-3)


@pytest.mark.parametrize("norm", ["official", "intended"])
def test_pseudo_masks_equal_the_loop(step, memory, norm):
    objective = SIM(prototypes=5, prototype_norm=norm)
    prototypes = objective.normalised(memory.prototypes)
    if norm == "official":
        assert_close(prototypes.norm(dim=1), torch.ones(C, D))
    else:
        assert_close(prototypes.norm(dim=2), torch.ones(C, 5))
    objects = objects_of(step)
    pseudo = objective.pseudo_masks(step, prototypes, objects)
    for g in range(2):
        box, mean = objects.boxes[g], objects.masks[g]
        values = torch.zeros(H, W)
        for y in range(H):
            for x in range(W):
                feature = step.shadow_features[objects.image[g], :, y, x]
                feature = feature / feature.norm()
                best = max(float(p @ feature) for p in prototypes[objects.labels[g]])
                values[y, x] = 0.5 / (1 + math.exp(-best)) + 0.5 * mean[y, x]
        ranked = sorted((values * box).flatten().tolist(), reverse=True)
        threshold = min(max(ranked[int(((mean > 0.7) & box).sum())], 0.7), 0.8)
        assert torch.equal(pseudo.target[g], (values > threshold) & box)
        assert torch.equal(pseudo.sure[g], ((values > threshold) | (values < 0.4)) & box)


def test_the_threshold_leaves_as_many_pixels_as_the_copy_is_sure_of(step):
    """s is M_I if the prototypes agree with M_I; the rank sets the threshold, clamped to 0.7 to 0.8."""
    objects = objects_of(step)
    box = torch.ones(1, H, W, dtype=torch.bool)
    for low, high, count in ((0.71, 0.79, 12), (0.85, 0.99, 12), (0.1, 0.6, 0)):
        own = torch.full((H * W,), 0.2)
        own[:12] = torch.linspace(low, high, 12)
        one = objects._replace(
            masks=own.view(1, H, W), boxes=box, labels=torch.zeros(1).long(), image=torch.zeros(1).long()
        )
        logit = torch.logit(own.view(H, W))
        features = torch.stack([logit.sign(), torch.zeros(H, W)])  # unit vectors; the prototype's length is the logit's
        copy = step._replace(shadow_features=features[None])
        prototypes = torch.zeros(1, 1, 2)
        prototypes[0, 0, 0] = 50.0  # M_S is 1 on the object's side and 0 off it
        found = OBJECTIVE.pseudo_masks(copy, prototypes, one)
        both = (own + (own > 0.5).float()) / 2
        rank = int((own > 0.7).sum())
        threshold = both.sort(descending=True).values[rank].clamp(0.7, 0.8)
        assert int(found.target.sum()) == int((both > threshold).sum())
        assert count == 0 or int(found.target.sum()) == count


def test_the_pseudo_loss_waits_and_is_one_ratio(step, memory):
    early = OBJECTIVE.losses(step._replace(iteration=9), memory)["loss_pseudo"].loss
    assert early == 0
    early.backward()
    assert step.positives.mask_logits.grad.abs().sum() == 0
    term = OBJECTIVE.losses(step, memory)["loss_pseudo"]
    objects = objects_of(step)
    pseudo = OBJECTIVE.pseudo_masks(step, OBJECTIVE.normalised(memory.prototypes), objects)
    total = count = 0.0
    for n, g in enumerate(objects.where.tolist()):
        p = step.positives.mask_logits[n].detach().sigmoid().double()
        for y in range(H):
            for x in range(W):
                if not pseudo.sure[g, y, x]:
                    continue
                count += 1
                value, positive = float(p[y, x]), bool(pseudo.target[g, y, x])
                error = math.log(1 + math.exp(-value if positive else value))  # the probability used as a logit
                off = 1 - value if positive else value
                total += (0.25 if positive else 0.75) * error * off**2
    assert count > 10
    assert term.loss.item() == pytest.approx(0.3 * 0.5 * total / (count + 1), rel=1e-5)
    assert term.per == count + 1


def test_equal_pixels_pull_one_prototype_by_its_share(step, memory):
    objective = SIM(prototypes=5, assignment="intended", prototype_norm="intended", share=0.01)
    vector = F.normalize(torch.tensor([1.0, 2, 3, 4]), dim=0)
    features = vector[None, :, None, None].expand(2, D, H, W)
    step = step._replace(features=7 * features, shadow_features=2 * features)
    step = step._replace(shadow=step.shadow._replace(mask_logits=torch.full((3, H, W), 9.0)))
    before = objective.normalised(memory.prototypes)
    objective.update(step, memory)
    after = memory.prototypes
    assert_close(after[0], before[0])  # no object of this class
    for label in (1, 2):
        moved = [q for q in range(5) if not torch.allclose(after[label, q], before[label, q], atol=1e-6)]
        assert len(moved) == 1
        assert_close(after[label, moved[0]], F.normalize(before[label, moved[0]].lerp(vector, 0.01), dim=0))


def test_prototypes_are_the_mean_over_the_processes_and_repeatable(step, memory):
    first, second = OBJECTIVE.memory(C, D), OBJECTIVE.memory(C, D)
    for own in (first, second):
        own.prototypes.copy_(memory.prototypes)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        OBJECTIVE.update(step._replace(generators=generators), own)
    assert torch.equal(first.prototypes, second.prototypes)
    assert not torch.allclose(first.prototypes, OBJECTIVE.normalised(memory.prototypes), atol=1e-7)
    other = torch.ones(C, 5, D)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    OBJECTIVE.update(step._replace(generators=generators, across=lambda own: (own + other) / 2), memory)
    assert_close(memory.prototypes, (first.prototypes + 1) / 2)


def test_prototypes_see_an_object_of_several_predictions_as_often_as_of_one(step, memory):
    """Positives of four predictions, one of which lacks the first object's second positive."""
    order = [0, 1, 2] * 4
    several = step._replace(
        repeats=4,
        **{name: Positives(*(part[order[:-1]] for part in getattr(step, name))) for name in ("positives", "shadow")},
    )
    again, started = OBJECTIVE.memory(C, D), memory.prototypes.clone()
    again.prototypes.copy_(started)
    masks = objects_of(step).masks
    OBJECTIVE.update(step, memory)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    several = several._replace(
        shadow=several.shadow._replace(
            mask_logits=masks.logit()[objects_of(several).where]  # the mean is that of one prediction
        ),
        generators=generators,
    )
    OBJECTIVE.update(several, again)
    assert_close(again.prototypes, memory.prototypes)
    assert not torch.allclose(again.prototypes, OBJECTIVE.normalised(started), atol=1e-7)


def test_without_instances_nothing_moves(step, memory):
    def empty(kept):
        return Positives(*(part[:0] for part in kept))

    none = step._replace(positives=empty(step.positives), shadow=empty(step.shadow))
    terms = OBJECTIVE.losses(none, memory)
    assert [term.loss.item() for term in terms.values()] == [0, 0, 0]
    before = OBJECTIVE.normalised(OBJECTIVE.normalised(OBJECTIVE.normalised(memory.prototypes)))
    OBJECTIVE.update(none, memory)
    assert_close(memory.prototypes, before)


# Pasting -------------------------------------------------------------------------------------------------------------
PASTE = dataclasses.replace(OBJECTIVE, paste=2, paste_rate=1.0)
SIZE = (32, 40)


def kept(rng, count):
    """A memory with images of 28 x 44 pixels; each has a disc of class 2, and an object without confident pixels."""
    memory = PASTE.memory(C, D)
    y, x = torch.meshgrid(torch.arange(7) - 3, torch.arange(11) - 5, indexing="ij")
    masks = torch.stack([torch.where(x**2 + y**2 <= 6, 0.95, 0.02), torch.zeros(7, 11)])
    for _ in range(count):
        pixels = torch.randint(0, 256, (3, 28, 44), generator=rng, dtype=torch.uint8)
        boxes = torch.tensor([[8.0, 2, 36, 27], [0, 0, 4, 4]])
        memory.on_host.put(Picture(pixels, masks, boxes, torch.tensor([2, 1])), sure=0.7)
    return memory


def batch_of(rng, boxes=((2.5, 3, 39, 31), (18, 10, 25, 18), (0, 0, 6, 5))):
    images = torch.randn(2, 3, *SIZE, generator=rng)
    instances = []
    for _ in range(2):
        own = InstanceData(bboxes=torch.tensor(boxes), labels=torch.arange(len(boxes)))
        own.set_metainfo({"img_shape": (26, 34)})
        instances.append(own)
    return images, instances


def draws(seed=0):
    return [torch.Generator().manual_seed(seed + b) for b in range(2)]


def test_nothing_is_pasted_before_the_queue_is_full_or_without_one(rng):
    images, instances = batch_of(rng)
    for objective, memory in ((PASTE, kept(rng, 1)), (OBJECTIVE, OBJECTIVE.memory(C, D))):
        found = objective.prepare(images, instances, memory, draws())
        assert found.images is images
        assert found.weak_view is images
        assert found.instances is instances


def test_pasted_pixels_are_the_pictures_and_the_rest_is_the_images(rng):
    memory, (images, instances) = kept(rng, 2), batch_of(rng)
    before = images.clone()
    found = PASTE.prepare(images, instances, memory, draws())
    assert torch.equal(images, before)
    assert found.weak_view is found.images
    for b, own in enumerate(found.instances):
        assert own.pasted.sum() == 1
        assert own.labels[-1] == 2
        (mask,) = own.within[own.pasted]
        assert mask.any()
        assert not mask[26:].any()  # padding
        assert not mask[:, 34:].any()
        assert torch.equal(own.bboxes[-1], extents(mask[None].float())[0])
        sources = [normalised(picture.pixels) for picture in memory.on_host.pictures]
        equal = [
            torch.equal(found.images[b][:, :26, :34][:, mask[:26, :34]], x[:, :26, :34][:, mask[:26, :34]])
            for x in sources
        ]
        assert sum(equal) == 1
        assert torch.equal(found.images[b][:, ~mask], images[b][:, ~mask])
        assert "masks" not in own


def test_what_is_covered_is_no_longer_the_others(rng):
    """The large box keeps its size and loses the disc, the one behind the disc vanishes, the distant one stays."""
    memory, (images, instances) = kept(rng, 2), batch_of(rng)
    own = PASTE.prepare(images, instances, memory, draws()).instances[0]
    mask = own.within[-1]
    assert mask[10:18, 18:25].all()
    assert own.labels.tolist() == [0, 2, 2]
    assert own.bboxes[:2].tolist() == [[2.0, 3.0, 39.0, 31.0], [0.0, 0.0, 6.0, 5.0]]
    whole = torch.zeros(SIZE, dtype=torch.bool)
    whole[3:31, 2:39] = True
    assert torch.equal(own.within[0], whole & ~mask)
    assert own.within[1].sum() == 30


def test_pasting_is_by_its_generator_and_its_rate(rng):
    memory, given = kept(rng, 2), batch_of(rng)
    one, other = (PASTE.prepare(*given, memory, draws(7)) for _ in range(2))
    assert torch.equal(one.images, other.images)
    half = dataclasses.replace(PASTE, paste_rate=0.5)
    pasted = sum(half.prepare(*given, memory, draws(2 * seed)).images is not given[0] for seed in range(200))
    assert 75 < pasted < 125


def test_the_terms_of_pasted_instances_equal_the_loop(step, memory):
    """Instances 1 and 2 belong to box 0, which is pasted: the other one has a dice of 1 and no gradient."""
    truth = Truth(torch.zeros(3, 4), torch.zeros(3).long(), torch.zeros(3).long(), torch.tensor([True, False, False]))
    terms = PASTE.losses(step._replace(truth=truth), memory)
    masks, target = step.positives.mask_logits.detach().sigmoid(), step.positives.box_masks
    total = 1.0
    for n in (1, 2):
        p, y = masks[n].double(), target[n].double()
        total += 1 - 2 * float((p * y).sum()) / (float((p * p).sum() + (y * y).sum()) + 1e-5)
    assert terms["loss_paste"].loss.item() == pytest.approx(total / 3, rel=1e-5)
    focal = focal_on(masks[1:], target[1:], torch.ones_like(target[1:]))
    assert_close(terms["loss_paste_focal"].loss, focal)
    assert terms["loss_paste_focal"].per == 2 * H * W + 1
    (terms["loss_paste"].loss + terms["loss_paste_focal"].loss).backward()
    grad = step.positives.mask_logits.grad
    assert grad[0].abs().sum() == 0
    assert (grad[1:].flatten(1).abs().sum(dim=1) > 0).all()


def test_without_pasted_objects_the_terms_are_zeros_with_a_gradient(step, memory):
    for truth in (None, Truth(torch.zeros(3, 4), torch.zeros(3).long(), torch.zeros(3).long())):
        terms = PASTE.losses(step._replace(truth=truth), memory)
        assert terms["loss_paste"].loss == 0
        assert terms["loss_paste_focal"].loss == 0
        terms["loss_paste"].loss.backward()
    assert "loss_paste" not in OBJECTIVE.losses(step, memory)


def test_pictures_are_kept_from_the_start_of_the_pseudo_masks_on(step, rng):
    pixels = torch.randint(0, 256, (2, 3, *SIZE), generator=rng, dtype=torch.uint8)
    truth = Truth(4 * torch.arange(12).view(3, 4).float(), torch.tensor([2, 0, 1]), torch.tensor([0, 0, 1]))
    step = step._replace(
        weak_view=normalised(pixels),
        truth=truth,
        shadow=step.positives._replace(mask_logits=torch.full((3, H, W), 3.0)),
    )
    memory = PASTE.memory(C, D)
    before = memory.prototypes.clone()
    PASTE.update(step._replace(iteration=9), memory)
    assert memory.on_host.pictures == []
    memory.prototypes.copy_(before)
    whole = torch.tensor([[0.0, 0, 40, 32]])
    PASTE.update(step._replace(truth=truth._replace(boxes=whole.expand(3, 4))), memory)
    plain = OBJECTIVE.memory(C, D)
    plain.prototypes.copy_(before)
    first, second = memory.on_host.pictures
    assert torch.equal(first.pixels, pixels[0])
    assert torch.equal(second.pixels, pixels[1])
    assert first.labels.tolist() == [2]
    assert second.labels.tolist() == [1]
    assert_close(first.masks.float(), torch.full((1, H, W), 3.0).sigmoid(), atol=1e-3, rtol=0)
    assert torch.equal(second.boxes, whole)


def test_pixels_come_back_from_the_networks_form(rng):
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    assert torch.equal(denormalised(normalised(pixels)), pixels)
    assert torch.equal(normalised(denormalised(normalised(pixels))), normalised(pixels))
