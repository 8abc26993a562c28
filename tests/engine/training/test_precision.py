"""Variants of a training step: half precision, accumulation, compiled networks, several processes."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODEL_WRAPPERS

from misa.engine.training.config import distributed
from misa.engine.training.optimizer import optimizer_config
from misa.engine.training.parallel import leave
from misa.rows import find_row
from tests.models.students.test_mask2former import TWO, batch
from tests.models.test_waits import network, student


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
    assert half != plain  # it was really not float32
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("values", ["class", "probability"])
def test_every_reading_of_s_trains_in_bfloat16(values, device):
    """The teacher's S is bfloat16 then, K is float32."""
    model, row = network(find_row("demo:misa").but(affinity={"semantic_values": values}))
    teacher = model.teacher
    model.to(device).attach(teacher)
    plain = step(copy.deepcopy(model), wrapped(model, row))
    half = step(model, wrapped(model, row, "bfloat16"))
    assert half["loss_global"] == pytest.approx(plain["loss_global"], rel=0.1)
    assert half["loss_local"] == pytest.approx(plain["loss_local"], rel=0.1)


def test_two_accumulated_halves_are_one_step(device):
    """For the same batch twice, since the mean of two equal gradients is either of them."""
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
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from torch's compiler
def test_compiled_networks_give_the_same_losses_and_names(device):
    """Only the backbone is compiled, on a CPU without code generation; the losses are not compiled."""
    model, row = on(device, "box")
    names = list(model.state_dict())
    plain = step(copy.deepcopy(model), wrapped(model, row))
    model.backbone.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    assert step(model, wrapped(model, row)) == pytest.approx(plain, rel=1e-3)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("precision", "place"),
    [("bfloat16", "cpu"), *(pytest.param(half, "cuda", marks=pytest.mark.gpu) for half in ("bfloat16", "float16"))],
)
def test_half_precision_learns(precision, place):
    """Also in float16, where a step with too large a gradient scale is skipped."""
    model, row = on(torch.device(place))
    wrapper = wrapped(model, row, precision)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(2 if precision == "bfloat16" else 8):
        assert all(abs(value) < float("inf") for value in step(model, wrapper).values())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True))
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


@contextmanager
def in_group(model, row, device, folder, **change):
    """Returns the model wrapped as in a training with several processes, in a group of one."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=store, rank=0, world_size=1)
    try:
        devices = [0] if device.type == "cuda" else None
        config = distributed(row)["model_wrapper_cfg"] | {"module": model, "device_ids": devices} | change
        yield MODEL_WRAPPERS.build(config)
    finally:
        leave()


@pytest.mark.parametrize("name", ["misa", "mask2former_misa", "boxinst"])
def test_processes_take_a_batch_without_objects(name, device, tmp_path):
    """Under DDP as configured for training, where a parameter without a gradient is an error."""
    model, row = on(device, name)
    alone = copy.deepcopy(model)
    data = alone.data_preprocessor(batch([], []), True)
    alone.parse_losses(alone.loss(data["inputs"], data["data_samples"]))[0].backward()
    assert all(p.grad is not None for p in alone.parameters() if p.requires_grad)
    with in_group(model, row, device, tmp_path) as parallel:
        wrapper = wrapped(parallel, row)
        for images in (([], []), TWO):  # DDP would raise at the second step
            losses = parallel.train_step(batch(*images), wrapper)
            assert all(value.isfinite().all() for value in losses.values())


def test_processes_refuse_what_no_step_may_leave_out(device, tmp_path):
    """Shows that the test above can fail."""
    model, row = on(device, "misa")
    model.unused = torch.nn.Linear(1, 1).to(device)
    with in_group(model, row, device, tmp_path) as parallel:
        wrapper = wrapped(parallel, row)
        parallel.train_step(batch(*TWO), wrapper)
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            parallel.train_step(batch(*TWO), wrapper)
