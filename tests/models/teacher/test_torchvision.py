import pytest
import torch
from torch.testing import assert_close
from torchvision.models import segmentation

from misa.models.teacher.torchvision import TorchvisionTeacher
from misa.ops.readings import class_probabilities, read

NAMES = ("__background__", "cat", "dog", "cow", "hen")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Disable TF32: otherwise a GPU's convolutions round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module", params=["fcn_resnet50", "deeplabv3_resnet50"])
def model(request):
    torch.manual_seed(0)
    network = getattr(segmentation, request.param)(weights=None, weights_backbone=None, num_classes=len(NAMES))
    return network.eval()


@pytest.mark.parametrize("size", [(64, 64), (65, 90)])
def test_the_feature_reproduces_the_networks_own_output(rng, device, model, size):
    teacher = TorchvisionTeacher(model, NAMES, ("hen", "cat")).to(device)
    images = torch.randn(2, 3, *size, generator=rng).to(device)
    assert not teacher.training
    prior = teacher.prior(images)
    h, w = (-(-side // 4) for side in size)
    last = model.classifier[-1]
    assert prior.features.shape == (2, last.in_channels, h, w)
    assert torch.equal(prior.saliency_factors, last.weight[[4, 1], :, 0, 0])
    # A 1x1 classifier and a bilinear resize commute, so S · K + bias is the network's output at that size.
    with torch.no_grad():
        coarse = model.classifier(model.backbone(images)["out"])
    expected = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)[:, [4, 1]]
    found = torch.einsum("cd,bdhw->bchw", prior.saliency_factors, prior.features) + last.bias[[4, 1], None, None]
    assert_close(found, expected, atol=1e-3, rtol=1e-3)
    layer = teacher.last_layer()
    assert torch.equal(layer.factors, prior.saliency_factors)
    assert torch.equal(layer.background, last.weight[0, :, 0, 0])
    assert torch.equal(layer.bias, last.bias[[4, 1]])
    assert torch.equal(layer.background_bias, last.bias[0])


def test_probabilities_are_those_of_the_network(rng, device, model):
    """Of the network's categories the student lacks two, which keep their share; two of its own are unknown to it."""
    teacher = TorchvisionTeacher(model, NAMES, ("yak", "cat", "hen", "gnu"), known={"cat": "cat", "hen": "hen"})
    teacher = teacher.to(device)
    prior = teacher.prior(torch.randn(1, 3, 64, 64, generator=rng).to(device))
    last = model.classifier[-1]
    with torch.no_grad():
        network = last(prior.features).softmax(dim=1)[0]
    expected = torch.stack([1 - network[0], network[1], network[4], 1 - network[0]])[None]
    assert_close(class_probabilities(prior.features, teacher.last_layer()), expected)
    found = read(prior.features, teacher.last_layer(), values="probability").values
    plain = (expected - expected.mean((2, 3), keepdim=True)) / expected.std((2, 3), correction=0, keepdim=True)
    assert_close(found, plain, rtol=1e-3, atol=1e-3)


def test_a_prior_carries_no_gradient_and_leaves_the_mode(rng, device, model):
    teacher = TorchvisionTeacher(model, NAMES, ("cat",)).to(device).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prior = teacher.prior(torch.randn(1, 3, 32, 32, generator=rng).to(device))
    assert teacher.training
    teacher.eval()
    assert not prior.features.requires_grad
    assert not prior.saliency_factors.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert teacher.contract.background == 0
    assert teacher.contract.classes == ("cat",)


def test_wrong_networks_and_names_are_one_clear_sentence(model):
    with pytest.raises(ValueError, match="ending in a 1x1 convolution"):
        TorchvisionTeacher(segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None), NAMES, ("cat",))
    with pytest.raises(ValueError, match="5 rows"):
        TorchvisionTeacher(model, NAMES[:4], ("cat",))
    with pytest.raises(ValueError, match="cannot teach yak: the network knows"):
        TorchvisionTeacher(model, NAMES, ("cat", "yak"))
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        TorchvisionTeacher(model, NAMES, ("cat",)).prior(torch.zeros(3, 32, 32))
