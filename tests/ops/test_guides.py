"""Guides: propagation uses the affinities of `KERNELS`, one row each."""

import pytest
import torch
from torch.testing import assert_close

from misa.errors import UserError
from misa.experiment import Affinity, Experiment
from misa.losses.pairwise import pairwise_loss
from misa.ops.affinity import KERNELS, AffinityInputs, Compared, pairwise_affinity
from misa.ops.backends.choice import use
from misa.ops.guides import Guides, Join
from misa.ops.neighbors import shift, window_offsets
from misa.ops.propagation import propagate_global, propagate_local

OPTIONS = {"window": 5, "bandwidth": 0.3, "steps": 1}


def step(masks, weights):
    """Eq. 14 over a window by definition: a mean over the neighbors and the pixel itself."""
    near = torch.stack([shift(masks, offset) for offset in window_offsets(5)], dim=1)
    centre = 1.7
    return (centre * masks + (weights * near).sum(dim=1)) / (centre + weights.sum(dim=1))


def kernel_affinity(name, inputs, *, sigma="image"):
    """One affinity of `KERNELS` to the neighbors of a window of 5 x 5; `sigma` where it fixes none."""
    values, factors, own = KERNELS[name](inputs)
    sigma = sigma if own is None else own
    return pairwise_affinity(values[None], window=5, channel_weights=factors, sigma=sigma)[0]


@pytest.fixture(params=["cpu", "torch"])
def path(request):
    with use(request.param):
        yield


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("second", ["feature", "saliency"])
def test_masks_go_along_the_affinities_of_the_equations(rng, second):
    """Eq. 8 and 10–14 by `ops.affinity`, against the code path of training."""
    masks, image = torch.rand(3, 9, 11, generator=rng), torch.rand(3, 9, 11, generator=rng)
    features, factors = torch.randn(6, 9, 11, generator=rng), torch.randn(5, 6, generator=rng)
    labels = [4, 1, 4]
    guides = Guides(image[None], [0, 0, 0], features[None], factors, labels, ("color", second))
    inputs = AffinityInputs(image, features, factors[[1, 4]])
    color, more = kernel_affinity("color", inputs, sigma=0.3), kernel_affinity(second, inputs)
    more = more[[1, 0, 1]] if second == "saliency" else more
    assert_close(guides.along_window(masks, None, **OPTIONS), step(masks, color + 0.7 * more), atol=1e-5, rtol=1e-5)


def toy(inputs: AffinityInputs) -> Compared:
    """Brightness, in units of 0.2."""
    return Compared(inputs.colors.mean(dim=0, keepdim=True), torch.ones(1, 1), 0.2)


@pytest.fixture
def with_toy(monkeypatch):
    monkeypatch.setitem(KERNELS, "brightness", toy)


@pytest.mark.usefixtures("with_toy", "path")
def test_a_new_affinity_is_one_function_and_one_row(rng):
    """It works with windows and trees, alone and combined with color, and in a loss without a teacher."""
    masks, image = torch.rand(3, 9, 11, generator=rng), torch.rand(3, 9, 11, generator=rng)
    brightness = image.mean(dim=0, keepdim=True)
    alone = Guides(image[None], [0, 0, 0], kernels=("brightness",))
    expected = propagate_local(masks, brightness, bandwidth=0.2, steps=1)
    assert_close(alone.along_window(masks, None, **OPTIONS), expected, atol=1e-6, rtol=0)
    expected = propagate_global(masks, brightness, bandwidth=0.2)
    assert_close(alone.along_trees(masks, alone.trees(), 0.9), expected, atol=1e-6, rtol=0)
    both = Guides(image[None], [0, 0, 0], kernels=("color", "brightness"))
    weights = kernel_affinity("color", AffinityInputs(image), sigma=0.3)
    weights = weights + 0.7 * kernel_affinity("brightness", AffinityInputs(image))
    assert_close(both.along_window(masks, None, **OPTIONS), step(masks, weights), atol=1e-5, rtol=1e-5)
    losses = {}
    for kernels in (("color",), ("color", "brightness")):
        logits = torch.zeros(3, 9, 11, requires_grad=True)
        for mode in ("apro", "pamr"):
            terms = pairwise_loss(
                (logits + masks).sigmoid(), torch.ones_like(masks), image[None], torch.zeros(3).long(),
                affinity=Affinity(kernels=kernels, mode=mode),
            )  # fmt: skip
            losses[kernels, mode] = sum(terms.values())
            losses[kernels, mode].backward()
        assert logits.grad.abs().sum() > 0
    for mode in ("apro", "pamr"):
        assert losses[("color",), mode] != losses[("color", "brightness"), mode]


def test_wrong_affinities_are_named(rng):
    image = torch.rand(1, 3, 4, 5, generator=rng)
    with pytest.raises(UserError, match="no affinity 'colour'; there are color, feature, saliency"):
        Guides(image, [0], kernels=("colour",))
    with pytest.raises(UserError, match="one affinity or two"):
        Guides(image, [0], kernels=("color",) * 3)
    with pytest.raises(ValueError, match="'saliency' compares the features of a semantic teacher, and there are none"):
        Guides(image, [0], kernels=("color", "saliency")).along_window(image[:, 0], None, **OPTIONS)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("form", ["sum", "product"])
def test_trees_built_ahead_change_nothing(rng, form):
    """Trees of the second affinity are built with the first's if the next pass needs them; others are built anew."""
    image, features = torch.rand(2, 3, 6, 7, generator=rng), torch.randn(2, 4, 6, 7, generator=rng)
    masks, factors = torch.rand(3, 6, 7, generator=rng), torch.randn(2, 4, generator=rng)
    valid = torch.ones(2, 6, 7, dtype=torch.bool)
    valid[1, 4:] = False

    def made() -> Guides:
        return Guides(image, [0, 1, 1], features, factors, [0, 0, 1], ("color", "saliency"), valid)

    for sigma, other in (("image", "image"), (0.5, 2.0)):
        usual, guides = made(), made()
        join = Join(form=form, sigma=sigma, factor=0.8)
        expected = usual.along_trees(masks, usual.trees(), 0.2, join)
        trees = guides.trees(ahead=join)
        assert torch.equal(trees.edge, usual.trees().edge)
        assert len(guides.built_ahead) == (form == "sum")
        changed = guides.along_trees(masks, trees, 0.2, Join(form=form, sigma=other, factor=0.3))
        assert not torch.equal(changed, expected)
        assert torch.equal(guides.along_trees(masks, trees, 0.2, join), expected)


@pytest.mark.parametrize("form", ["sum", "product"])
def test_a_balance_of_zero_leaves_the_first_alone(rng, form):
    image, features = torch.rand(1, 3, 6, 7, generator=rng), torch.randn(1, 4, 6, 7, generator=rng)
    valid = torch.ones(1, 6, 7, dtype=torch.bool)
    valid[0, :, 5:] = False
    masks, factors = torch.rand(2, 6, 7, generator=rng), torch.randn(2, 4, generator=rng)
    both = Guides(image, [0, 0], features, factors, [0, 1], ("color", "saliency"), valid)
    alone = both.first_only()
    found = both.along_trees(masks, both.trees(), 0.2, Join(balance=0.0, form=form))
    assert_close(found, alone.along_trees(masks, alone.trees(), 0.2))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kernels", [("own",), ("own", "color"), ("color", "own")])
def test_every_image_of_a_batch_has_its_own_sigma(rng, monkeypatch, kernels):
    """An affinity whose σ depends on the image: its masks are the same alone and behind another image."""
    monkeypatch.setitem(
        KERNELS, "own", lambda inputs: Compared(inputs.colors, torch.ones(1, 3), float(inputs.colors.std()) * 0.3)
    )
    images = torch.rand(2, 3, 9, 11, generator=rng) * torch.tensor([1.0, 0.05])[:, None, None, None]
    masks = torch.rand(2, 9, 11, generator=rng)
    both, alone = Guides(images, [0, 1], kernels=kernels), Guides(images[1:], [0], kernels=kernels)
    together = both.along_trees(masks, both.trees(), 0.3)[1:]
    assert_close(together, alone.along_trees(masks[1:], alone.trees(), 0.3))
    assert_close(both.along_window(masks, None, **OPTIONS)[1:], alone.along_window(masks[1:], None, **OPTIONS))


@pytest.mark.usefixtures("path", "with_toy")
@pytest.mark.parametrize("sigma", ["image", "window", 1.0])
def test_the_sigma_of_a_reading_of_s_leaves_that_of_other_affinities(rng, sigma):
    masks, image = torch.rand(2, 9, 11, generator=rng), torch.rand(1, 3, 9, 11, generator=rng)
    guides = Guides(image, [0, 0], kernels=("color", "brightness"))
    by_sigma = guides.along_window(masks, None, **OPTIONS, join=Join(sigma=sigma))
    inputs = AffinityInputs(image[0], None, None)
    color, more = kernel_affinity("color", inputs, sigma=0.3), kernel_affinity("brightness", inputs)
    assert_close(by_sigma, step(masks, color + 0.7 * more), atol=1e-5, rtol=1e-5)
    if sigma != "window":
        trees = guides.trees()
        assert_close(guides.along_trees(masks, trees, 0.3, Join(sigma=sigma)), guides.along_trees(masks, trees, 0.3))


@pytest.mark.parametrize("kernels", [("saliency",), ("saliency", "color"), ("feature", "color")])
def test_a_semantic_affinity_is_refused_as_the_first(rng, kernels):
    """It would use one category's row of K for all masks, and a bandwidth of colors for its σ."""
    features, factors = torch.randn(1, 6, 4, 4, generator=rng), torch.randn(3, 6, generator=rng)
    with pytest.raises(UserError, match="can only be the second one"):
        Guides(torch.rand(1, 3, 4, 4, generator=rng), [0, 0], features, factors, [0, 2], kernels)
    with pytest.raises(ValueError, match="which can only be the second"):
        Experiment(affinity=Affinity(kernels=kernels))
