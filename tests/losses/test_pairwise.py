"""Eq. 15 against its propagations, computed instance by instance."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from misa.errors import NotFinite
from misa.experiment import Affinity
from misa.losses import pairwise
from misa.losses.pairwise import pairwise_loss, propagation_error, pseudo_masks
from misa.ops.guides import Guides
from misa.ops.propagation import SemanticGuide, propagate_global, propagate_local, propagate_pamr, stretched
from misa.ops.tree import minimum_spanning_tree

TERMS = {"apro": {"loss_global", "loss_local"}, "pamr": {"loss_pamr"}}


def batch(rng, h=12, w=14, n=5, b=3):
    """Masks of images 0 and 2; image 1 has none."""
    masks = torch.rand(n, h, w, generator=rng)
    boxes = torch.zeros(n, h, w, dtype=torch.bool)
    for i in range(n):
        boxes[i, i : i + 6, 2 * i : 2 * i + 4] = True
    images = torch.rand(b, 3, h, w, generator=rng)
    index, labels = torch.tensor([0, 2, 0, 2, 0]), torch.tensor([1, 1, 3, 0, 1])
    prior = (torch.randn(b, 6, h, w, generator=rng), torch.randn(4, 6, generator=rng))
    return masks, boxes, images, index, labels, prior


def loss_of(masks, boxes, images, index, *, labels=None, prior=None, valid=None, function=pairwise_loss, **fields):
    """Returns the loss, or the pseudo masks, of an affinity with saliency and these fields."""
    affinity = Affinity(**{"saliency": True, **fields})
    return function(masks, boxes, images, index, affinity=affinity, labels=labels, prior=prior, valid=valid)


def slow_loss(masks, boxes, images, index, labels, prior, form, refine=0.07, valid=None):
    """The loss instance by instance, with the public functions."""
    terms = {"loss_global": 0.0, "loss_local": 0.0}
    for i, image in enumerate(index.tolist()):
        padding = None if valid is None else valid[image]
        more = {"valid": padding}
        if prior is not None:
            more |= {"semantic": SemanticGuide(prior[0][image], prior[1]), "labels": labels[i : i + 1]}
        mask, guide, box = masks[i : i + 1], images[image], boxes[i : i + 1]
        tree = minimum_spanning_tree(guide, valid=padding)
        if form == "embedding" and prior is not None:
            first = propagate_global(mask, guide, bandwidth=0.01, tree=tree)
            second = propagate_global(first, guide, bandwidth=0.01, tree=tree, global_form=form, **more)
        else:
            second = propagate_global(mask, guide, bandwidth=0.01, tree=tree, global_form=form, **more)
            if refine is not None:
                second = propagate_global(second, second[:, None], bandwidth=refine, tree=tree)
        local = propagate_local(mask, guide, box_masks=box, **more)
        area = box.sum()
        terms["loss_global"] += 2 * ((second - mask).abs() * box).sum() / area / len(masks)
        terms["loss_local"] += ((local - mask).abs() * box).sum() / area / len(masks)
    return terms


@pytest.mark.parametrize("form", ["sum", "embedding", "product"])
@pytest.mark.parametrize("semantic", [False, True])
def test_all_at_once_is_instance_by_instance(rng, device, form, semantic):
    masks, boxes, images, index, labels, prior = batch(rng)
    images = 0.02 * images  # neighbors close enough for the bandwidths to matter
    valid = torch.ones(3, 12, 14, dtype=torch.bool)
    valid[2, :, 11:] = False
    expected = slow_loss(masks, boxes, images, index, labels, prior if semantic else None, form, valid=valid)
    result = loss_of(
        masks.to(device),
        boxes.to(device),
        images.to(device),
        index.to(device),
        labels=labels.to(device),
        prior=tuple(x.to(device) for x in prior) if semantic else None,
        valid=valid[:, None].to(device),
        global_form=form,
    )
    assert set(result) == TERMS["apro"]
    for name, value in result.items():
        assert_close(value.cpu(), expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize(("form", "local"), [("sum", "sum"), ("embedding", "sum"), ("product", "product")])
def test_an_image_is_taught_the_same_beside_a_larger_one(rng, device, form, local, semantic):
    """The values in the padding, including S, affect no tree, window or spread."""
    masks, boxes, images, index, labels, prior = batch(rng)

    def loss(right, below):
        def pad(values, fill):
            return F.pad(values.float(), (0, right, 0, below), value=fill).to(values.dtype).to(device)

        valid = pad(torch.ones(3, 1, 12, 14), 0) > 0
        return loss_of(
            pad(masks, 0.7),
            pad(boxes, 0),
            pad(0.02 * images, 5.0),
            index.to(device),
            labels=labels.to(device),
            prior=(pad(prior[0], 3.0), prior[1].to(device)) if semantic else None,
            valid=valid,
            global_form=form,
            local_form=local,
        )

    alone, beside = loss(0, 0), loss(6, 3)
    for name, value in alone.items():
        assert value > 1e-3
        assert_close(beside[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("below", [1, 2, 3, 4])
def test_squeezed_guides_take_nothing_from_padding(rng, device, below):
    """Cells that extend beyond the border use only pixels of the image, whatever is in the padding."""
    _, _, images, _, _, prior = batch(rng)
    valid = torch.ones(3, 12, 14, dtype=torch.bool)
    valid[:, 12 - below :] = False
    both = []
    for noise in (0.0, 9.0):
        spoiled = [(x + noise * ~valid[:, None]).to(device) for x in (images, prior[0])]
        teacher = {"features": spoiled[1], "factors": prior[1].to(device), "labels": [0, 1, 2]}
        guides = Guides(spoiled[0], [0, 1, 2], valid=valid.to(device), kernels=("color", "saliency"), **teacher)
        both.append(guides.at_size((8, 8)))
    there = both[0].valid.cpu()
    assert there.sum(dim=1).unique().tolist() == [round((12 - below) * 8 / 12 + 1e-6)]
    for name in ("images", "features"):
        one, other = (getattr(its, name).movedim(1, -1)[its.valid] for its in both)
        assert_close(one, other, atol=0, rtol=0)
    flat = replace(guides, images=(torch.full_like(images, 2.0) * valid[:, None]).to(device))
    even = flat.at_size((8, 8))
    assert_close(even.images.movedim(1, -1)[even.valid].cpu(), torch.tensor(2.0).expand(int(there.sum()), 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["apro", "pamr"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_prior_that_is_no_number_is_refused(rng, mode, which, bad):
    masks, boxes, images, index, labels, prior = batch(rng)
    prior[which].view(-1)[7] = bad
    with pytest.raises(NotFinite, match=r"(semantic features|saliency factors) has NaN or Inf"):
        loss_of(masks, boxes, images, index, labels=labels, prior=prior, mode=mode)


def test_pamr_is_its_propagation(rng, device):
    masks, boxes, images, index, labels, prior = batch(rng)
    expected = 0.0
    for i, image in enumerate(index.tolist()):
        semantic = SemanticGuide(prior[0][image], prior[1])
        target = propagate_pamr(
            masks[i : i + 1], images[image], box_masks=boxes[i : i + 1], semantic=semantic, labels=labels[i : i + 1]
        )
        expected += ((target - masks[i]).abs() * boxes[i]).sum() / boxes[i].sum() / 5
    moved = (x.to(device) for x in (masks, boxes, images, index))
    result = loss_of(*moved, labels=labels.to(device), prior=tuple(x.to(device) for x in prior), mode="pamr")
    assert set(result) == TERMS["pamr"]
    assert_close(result["loss_pamr"].cpu(), expected, atol=1e-6, rtol=1e-5)


def test_how_far_pamr_looks(rng):
    masks, boxes, images, index, _, _ = batch(rng)
    near = {"dilations": (1, 2), "steps": 3}
    expected = sum(
        (abs(propagate_pamr(masks[i : i + 1], images[image], box_masks=boxes[i : i + 1], **near) - masks[i]) * boxes[i])
        .sum()
        .div(5 * boxes[i].sum())
        for i, image in enumerate(index.tolist())
    )
    result = loss_of(masks, boxes, images, index, mode="pamr", pamr_dilations=(1, 2), pamr_steps=3)
    assert_close(result["loss_pamr"], expected, atol=1e-6, rtol=1e-5)


def test_pamr_takes_the_form_and_the_scale_of_the_prior(rng):
    """Like the other mode: neighboring rows of Table 5 differ only in the mode."""
    masks, boxes, images, index, labels, prior = batch(rng)
    options = {"labels": labels, "prior": prior, "mode": "pamr"}
    found = loss_of(masks, boxes, images, index, local_form="product", semantic_scale=1.5, **options)
    expected = 0.0
    for i, image in enumerate(index.tolist()):
        target = propagate_pamr(
            masks[i : i + 1],
            images[image],
            box_masks=boxes[i : i + 1],
            semantic=SemanticGuide(prior[0][image], prior[1]),
            labels=labels[i : i + 1],
            form="product",
            semantic_scale=1.5,
        )
        expected += ((target - masks[i]).abs() * boxes[i]).sum() / boxes[i].sum() / 5
    assert_close(found["loss_pamr"], expected)
    assert abs(found["loss_pamr"] - loss_of(masks, boxes, images, index, **options)["loss_pamr"]) > 1e-4


def test_pamr_leaves_padding_out(rng):
    masks, boxes, images, index, _, _ = batch(rng)
    valid = torch.ones(3, 1, 12, 14, dtype=torch.bool)
    valid[0, :, :, 10:] = False
    boxes &= valid[index, 0]
    plain = loss_of(masks, boxes, images, index, mode="pamr", valid=valid)
    other = loss_of(masks, boxes, images + 9 * ~valid, index, mode="pamr", valid=valid)
    assert_close(plain["loss_pamr"], other["loss_pamr"])
    assert abs(plain["loss_pamr"] - loss_of(masks, boxes, images, index, mode="pamr")["loss_pamr"]) > 1e-5


def test_weights_and_the_literal_sum(rng):
    masks, boxes, images, index, _, _ = batch(rng)
    plain = loss_of(masks, boxes, images, index)
    heavy = loss_of(masks, boxes, images, index, global_weight=4.0, local_weight=3.0)
    assert_close(heavy["loss_global"], 2 * plain["loss_global"])
    assert_close(heavy["loss_local"], 3 * plain["loss_local"])
    seen, target = loss_of(masks, boxes, images, index, refine_bandwidth=None, function=pseudo_masks)["global"]
    expected = sum(
        (propagate_global(masks[i : i + 1], images[k], bandwidth=0.01) - masks[i]).abs().sum()
        for i, k in enumerate(index.tolist())
    )
    assert_close(propagation_error(seen, target, boxes, reduction="sum"), expected)


def test_saliency_matters(rng):
    masks, boxes, images, index, labels, prior = batch(rng)
    options = {"labels": labels, "prior": prior, "semantic_scale": 0.5}
    with_k = loss_of(masks, boxes, images, index, **options)
    without = loss_of(masks, boxes, images, index, saliency=False, feature=True, **options)
    other = loss_of(masks, boxes, images, index, balance=0.1, **options)
    for name in TERMS["apro"]:
        assert abs(with_k[name] - without[name]) > 1e-5
        assert abs(with_k[name] - other[name]) > 1e-5


@pytest.mark.parametrize("mode", ["apro", "pamr"])
def test_gradient_flows_through_the_masks_alone(rng, mode):
    masks, boxes, images, index, labels, prior = batch(rng)
    inputs = [x.requires_grad_() for x in (masks, images, *prior)]
    terms = loss_of(masks, boxes, images, index, labels=labels, prior=prior, mode=mode)
    sum(terms.values()).backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.isfinite().all()
    assert (inputs[0].grad[~boxes] == 0).all()
    assert all(x.grad is None for x in inputs[1:])


@pytest.mark.parametrize("reduction", ["box_mean", "sum"])
def test_error_has_the_gradient_of_an_absolute_value(rng, reduction):
    masks = torch.rand(2, 3, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    pseudo = torch.rand(2, 3, 4, generator=rng, dtype=torch.float64)
    boxes = torch.rand(2, 3, 4, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: propagation_error(m, pseudo, boxes, reduction=reduction), masks)


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("options", [{}, {"global_size": 7, "reduction": "box_ratio"}, {"mode": "pamr"}])
def test_gradcheck(rng, monkeypatch, options, semantic):
    """Of the whole loss in float64, with the pseudo masks fixed, as they are targets without gradient."""
    masks, boxes, images, index, labels, prior = batch(rng, h=8, w=9, n=3, b=3)
    index, labels = index[:3], labels[:3]
    images = 0.02 * images  # similar enough that every pixel changes and none is at the kink of |.|
    for name in ("global_masks", "local_masks", "along_pamr"):
        made = getattr(pairwise, name)
        kept = []

        def once(*args, made=made, kept=kept, **options):
            if not kept:
                kept.append(made(*args, **options))
            return kept[0]

        monkeypatch.setattr(pairwise, name, once)

    def loss(m):
        terms = loss_of(m, boxes, images, index, labels=labels, prior=prior if semantic else None, **options)
        return sum(terms.values())

    masks = masks.double().requires_grad_()
    assert loss(masks) > 1e-3
    assert torch.autograd.gradcheck(loss, masks)


@pytest.mark.parametrize("mode", ["apro", "pamr"])
def test_no_instances_give_zeros_with_a_gradient(device, mode):
    masks = torch.zeros(0, 6, 7, device=device, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    prior = (torch.zeros(2, 4, 6, 7, device=device), torch.zeros(3, 4, device=device))
    terms = loss_of(
        masks,
        masks.detach().bool(),
        torch.zeros(2, 3, 6, 7, device=device),
        nothing,
        labels=nothing,
        prior=prior,
        mode=mode,
    )
    assert set(terms) == TERMS[mode]
    for term in terms.values():
        assert term == 0
        term.backward(retain_graph=True)
    assert masks.grad is not None


def test_empty_box_counts_zero(rng):
    masks, boxes, images, index, _, _ = batch(rng)
    boxes[1] = False
    terms = loss_of(masks.requires_grad_(), boxes, images, index)
    sum(terms.values()).backward()
    assert masks.grad.isfinite().all()
    assert (masks.grad[1] == 0).all()


def test_one_pixel_box_is_divided_by_one(rng):
    masks, pseudo = torch.rand(2, 3, 4, generator=rng), torch.rand(2, 3, 4, generator=rng)
    boxes = torch.zeros(2, 3, 4)
    boxes[0, 1, 2] = 1
    boxes[1, :, 1:] = 1
    expected = (abs(pseudo[0, 1, 2] - masks[0, 1, 2]) + (pseudo[1] - masks[1])[:, 1:].abs().sum() / 9) / 2
    assert_close(propagation_error(masks, pseudo, boxes), expected)


def test_order_of_instances_does_not_matter(rng):
    masks, boxes, images, index, labels, prior = batch(rng)
    order = torch.tensor([3, 1, 4, 0, 2])
    one = loss_of(masks, boxes, images, index, labels=labels, prior=prior)
    two = loss_of(masks[order], boxes[order], images, index[order], labels=labels[order], prior=prior)
    for name in one:
        assert_close(one[name], two[name])


def test_half_precision_and_autocast(rng, device):
    masks, boxes, images, index, labels, prior = (x if isinstance(x, tuple) else x.to(device) for x in batch(rng))
    prior = tuple(x.to(device) for x in prior)
    plain = loss_of(masks, boxes, images, index, labels=labels, prior=prior)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = loss_of(masks, boxes, images, index, labels=labels, prior=prior)
    half = loss_of(masks.half(), boxes, images.half(), index, labels=labels, prior=tuple(x.half() for x in prior))
    for name in plain:
        assert_close(inside[name], plain[name])
        assert_close(half[name].float(), plain[name], atol=5e-3, rtol=5e-2)


def test_wrong_input_is_named(rng):
    masks, boxes, images, index, labels, prior = batch(rng)
    with pytest.raises(ValueError, match="image_index"):
        loss_of(masks, boxes, images, index[:-1])
    with pytest.raises(ValueError, match="one of the images"):
        loss_of(masks, boxes, images[:2], index)
    with pytest.raises(ValueError, match="image_index"):
        loss_of(masks, boxes, images, index[:, None])
    with pytest.raises(ValueError, match=r"images \(b, d, h, w\)"):
        loss_of(masks, boxes, images[0], index * 0)
    with pytest.raises(ValueError, match="one box mask per mask"):
        loss_of(masks, boxes[:-1], images, index)
    with pytest.raises(ValueError, match="Resize"):
        loss_of(masks, boxes, images[..., :-1], index)
    with pytest.raises(ValueError, match="masks has NaN"):
        loss_of(masks / 0 * 0, boxes, images, index)
    with pytest.raises(ValueError, match=r"Affinity\.mode is 'crf'; choose one of apro, pamr"):
        loss_of(masks, boxes, images, index, mode="crf")
    with pytest.raises(ValueError, match="reductions"):
        propagation_error(masks, masks, boxes, reduction="mean")
    with pytest.raises(ValueError, match="needs labels"):
        loss_of(masks, boxes, images, index, prior=prior)
    with pytest.raises(ValueError, match="row of K"):
        loss_of(masks, boxes, images, index, labels=labels + 1, prior=prior)
    with pytest.raises(ValueError, match="Guides needs images"):
        loss_of(masks, boxes, images, index, labels=labels, prior=(prior[0][:, 1:], prior[1]))
    with pytest.raises(ValueError, match="size of the masks"):
        loss_of(masks, boxes, images, index, labels=labels, prior=(prior[0][..., 1:], prior[1]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:propagation on CUDA within torch.compile:UserWarning")
def test_torch_compile(rng, device):
    masks, boxes, images, index, labels, prior = batch(rng)
    masks = masks.requires_grad_()
    inputs = (masks, boxes, images, index)
    options = {"affinity": Affinity(saliency=True), "labels": labels, "prior": prior}
    plain = pairwise_loss(*inputs, **options)
    terms = torch.compile(pairwise_loss, backend="aot_eager")(*inputs, **options)
    for name in plain:
        assert_close(terms[name], plain[name], atol=1e-5, rtol=1e-4)
    sum(terms.values()).backward()
    assert masks.grad.isfinite().all()


def test_the_ratio_counts_every_pixel_alike(rng):
    """In loops: the summed error of all boxes over their summed area."""
    masks, target = torch.rand(2, 3, 5, 7, generator=rng)
    boxes = torch.rand(3, 5, 7, generator=rng) > 0.4
    error = area = 0.0
    for n in range(3):
        for i in range(5):
            for j in range(7):
                if boxes[n, i, j]:
                    error += abs(float(target[n, i, j]) - float(masks[n, i, j]))
                    area += 1
    got = propagation_error(masks, target, boxes, reduction="box_ratio")
    assert got.item() == pytest.approx(error / area, rel=1e-5)
    assert propagation_error(masks[:0], target[:0], boxes[:0], reduction="box_ratio") == 0


def test_a_global_size_squeezes_images_and_masks_alike(rng):
    """Against the public functions: bilinear downsampling, two passes, bilinear upsampling, compared inside the box."""
    masks = torch.rand(2, 12, 20, generator=rng, requires_grad=True)
    images = torch.randn(1, 3, 12, 20, generator=rng)
    boxes = torch.zeros(2, 12, 20, dtype=torch.bool)
    boxes[0, 2:9, 3:15] = boxes[1, 5:12, 1:6] = True
    index = torch.zeros(2, dtype=torch.long)
    got = loss_of(masks, boxes, images, index, global_size=8, global_weight=1.0)

    def resize(x, size):
        return torch.nn.functional.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]

    small, guide = resize(masks, (8, 8)), resize(images[0], (8, 8))
    tree = minimum_spanning_tree(guide)
    first = propagate_global(small.detach(), guide, bandwidth=0.01, tree=tree)
    second = propagate_global(first, first[:, None], bandwidth=0.07, tree=tree)
    error = (resize(small, (12, 20)) - resize(second, (12, 20))).abs() * boxes
    expected = (error.sum((1, 2)) / boxes.sum((1, 2))).mean()
    torch.testing.assert_close(got["loss_global"], expected)
    full = loss_of(masks, boxes, images, index, global_weight=1.0)
    assert torch.equal(got["loss_local"], full["loss_local"])
    assert not torch.allclose(got["loss_global"], full["loss_global"])
    torch.autograd.grad(got["loss_global"], masks)


@pytest.mark.parametrize("mode", TERMS)
def test_the_loss_is_the_distance_to_the_pseudo_masks(rng, mode):
    masks, boxes, images, index, labels, prior = batch(rng)
    options = {"labels": labels, "prior": prior, "mode": mode}
    pairs = loss_of(masks, boxes, images, index, **options, function=pseudo_masks)
    found = loss_of(masks, boxes, images, index, **options)
    assert {f"loss_{name}" for name in pairs} == set(found) == TERMS[mode]
    for name, (seen, target) in pairs.items():
        weight = 2.0 if name == "global" else 1.0
        assert torch.equal(seen, masks)
        assert_close(found[f"loss_{name}"], weight * propagation_error(masks, target, boxes))


def test_the_window_can_be_a_share_of_the_map(rng):
    masks, boxes, images, index, *_ = batch(rng, h=24, w=30)
    by_share = loss_of(masks, boxes, images, index, window_share=0.08, window=9)
    assert torch.equal(by_share["loss_local"], loss_of(masks, boxes, images, index, window=5)["loss_local"])
    assert not torch.equal(by_share["loss_local"], loss_of(masks, boxes, images, index, window=3)["loss_local"])


@pytest.mark.parametrize("fields", [{"mode": "apro"}, {"mode": "pamr"}, {"global_size": 9}], ids=str)
def test_every_term_can_be_stretched(rng, fields):
    masks, boxes, images, index, labels, prior = batch(rng)
    options = {"labels": labels, "prior": prior, **fields}
    plain = loss_of(masks, boxes, images, index, **options, function=pseudo_masks)
    found = loss_of(masks, boxes, images, index, **options, stretch=0.5, function=pseudo_masks)
    third = loss_of(masks, boxes, images, index, **options, stretch=0.3, function=pseudo_masks)
    assert found.keys() == plain.keys()
    for name, (seen, target) in found.items():
        assert torch.equal(seen, plain[name][0])
        assert torch.equal(target, stretched(plain[name][1], boxes))
        assert torch.equal(third[name][1], stretched(plain[name][1], boxes, 0.3))


def test_stretched_an_unsure_mask_finds_the_object_that_the_affinity_separates():
    """An object and a background that a network gives 0.35 and 0.2 on average: all of the plain pseudo mask is below
    one half, its stretched one is the object.
    """
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 4:12, 4:10] = 5.0
    truth = images[:, 0] > 0
    boxes = torch.zeros(1, 16, 16, dtype=torch.bool)
    boxes[:, 3:13, 3:11] = True
    noise = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    masks = torch.where(truth, 0.35, 0.2) + 0.2 * noise
    inputs = (masks, boxes, images, torch.tensor([0]))
    plain = pseudo_masks(*inputs)
    found = pseudo_masks(*inputs, affinity=Affinity(stretch=0.5))
    for name in ("global", "local"):
        assert not (plain[name][1] > 0.5)[boxes].any()
        assert torch.equal((found[name][1] > 0.5) & boxes, truth)


@pytest.mark.parametrize("reduction", ["box_mean", "box_ratio", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_can_count_a_large_box(device, reduction, dtype):
    """90,000 pixels are beyond float16: the error of 0.25 in each would be divided by infinity."""
    masks = torch.full((1, 300, 300), 0.25, device=device, dtype=dtype, requires_grad=True)
    target, boxes = torch.full_like(masks, 0.5), torch.ones(1, 300, 300, dtype=torch.bool, device=device)
    found = propagation_error(masks, target, boxes, reduction=reduction)
    assert_close(found.item(), 0.25 * (90000 if reduction == "sum" else 1))
    found.backward()
    assert (masks.grad < 0).all()
