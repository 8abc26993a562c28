"""What a step may be wrapped in: half precision, accumulation, compiled networks, several processes."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from misa.engine.training.optimizer import optimizer_config
from tests.models.students.test_mask2former import TWO, batch
from tests.models.test_waits import student


def wrapped(model, row, precision="float32", **more):
    return build_optim_wrapper(model, optimizer_config(row.but(schedule={"precision": precision}), **more))


def on(device, name="misa"):
    model, row = student(name)
    teacher = model.teacher
    model.to(device)
    if teacher is not None:
        model.attach(teacher)
    return model, row


def step(model, wrapper):
    return {name: value.item() for name, value in model.train_step(batch(*TWO), wrapper).items()}


@pytest.mark.parametrize("name", ["misa", "mask2former_misa"])
def test_bfloat16_trains_float32_weights_on_nearly_the_same_losses(name, device):
    model, row = on(device, name)
    plain = step(copy.deepcopy(model), wrapped(model, row))
    before = [p.detach().clone() for p in model.parameters()]
    half = step(model, wrapped(model, row, "bfloat16"))
    assert half.keys() == plain.keys()
    assert half["loss_projection"] == pytest.approx(plain["loss_projection"], rel=0.1)
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.2)
    assert half != plain  # it was not float32 after all
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_two_accumulated_halves_are_one_step(device):
    """The same batch twice: the mean of two equal gradients is one of them."""
    model, row = on(device, "box")
    other = copy.deepcopy(model)
    step(model, wrapped(model, row))
    wrapper = wrapped(other, row, accumulate=2)
    wrapper.initialize_count_status(other, 0, 4)
    start = [p.detach().clone() for p in other.parameters()]
    step(other, wrapper)
    assert all(torch.equal(p, old) for p, old in zip(other.parameters(), start, strict=True))
    step(other, wrapper)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(p, old) for p, old in zip(other.parameters(), start, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch's compiler
def test_compiled_networks_give_the_same_losses_and_names(device):
    """The backbone alone, by autograd's graph without code generation on a CPU; the losses stay outside."""
    model, row = on(device, "box")
    names = list(model.state_dict())
    plain = step(copy.deepcopy(model), wrapped(model, row))
    model.backbone.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    assert step(model, wrapped(model, row)) == pytest.approx(plain, rel=1e-3)
    assert list(model.state_dict()) == names


@pytest.mark.gpu
def test_float16_scales_its_gradients():
    model, row = on(torch.device("cuda"))
    wrapper = wrapped(model, row, "float16")
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(8):  # the first scales may be too large, and such a step is left out
        assert all(abs(value) < float("inf") for value in step(model, wrapper).values())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_a_process_group_of_a_gpu_takes_unused_parameters(tmp_path):
    import torch.distributed as dist

    from misa.engine.training.parallel import leave

    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 3), "unused": torch.nn.Linear(3, 3)}).cuda()
        model.forward = lambda x: model["used"](x)
        parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0], find_unused_parameters=True)
        for _ in range(2):  # the second forward pass is where a missing gradient would be an error
            parallel(torch.ones(2, 3, device="cuda")).sum().backward()
        assert model["used"].weight.grad is not None
        assert model["unused"].weight.grad is None
    finally:
        leave()
