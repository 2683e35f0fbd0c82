"""What torch.distributed does with a model: replicas, shards, checkpoints of them; two processes on the CPU."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from children import in_group
from habits import FORMS, Case, close, heads
from torch import nn

ARCH = "test_vit"  # without batch norms, so that gradients of two halves are those of the whole


def images(whole=False):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 2, 3])
    half = slice(None) if whole else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return x[half], labels[half]


def made(form):
    torch.manual_seed(0)
    return Case(ARCH, form).make().train()


def gradients_of_the_whole(form):
    model = made(form)
    x, labels = images(whole=True)
    nn.functional.cross_entropy(model(x), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def backward(model):
    x, labels = images()
    nn.functional.cross_entropy(model(x), labels).backward()


def check(model, form):
    """Gradients of the processes' halves are those of one process, whatever a parameter's name now begins with."""
    wanted = gradients_of_the_whole(form)
    got = {
        name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        close(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient, wanted[name], 1e-2)


def mesh():
    return dist.init_device_mesh("cpu", (2,))


def replicated(form):
    model = nn.parallel.DistributedDataParallel(made(form))
    backward(model)
    check(model, form)


def replicated_statically(form):
    model = nn.parallel.DistributedDataParallel(made(form), static_graph=True, gradient_as_bucket_view=True)
    backward(model)
    check(model, form)


def fully_sharded(form):
    from torch.distributed.fsdp import fully_shard

    model = made(form)
    for block in model.blocks:
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())
    backward(model)
    check(model, form)


def the_head_sharded_alone(form):
    from torch.distributed.fsdp import fully_shard

    model = made(form)
    fully_shard(heads(model)[0][1], mesh=mesh())
    fully_shard(model, mesh=mesh())
    backward(model)
    check(model, form)


def every_part_sharded_alone(form):
    from torch.distributed.fsdp import fully_shard

    model = made(form)
    for module in reversed(list(model.modules())):
        if next(module.parameters(recurse=False), None) is not None or module is model:
            fully_shard(module, mesh=mesh())
    backward(model)
    check(model, form)


def sharded_from_the_meta_device(form):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    whole = made(form)
    with torch.device("meta"):
        model = Case(ARCH, form).make().train()
    for block in model.blocks:
        fully_shard(block, mesh=mesh())
    fully_shard(model, mesh=mesh())
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    set_model_state_dict(model, whole.state_dict(), options=options)
    close(model.eval()(images()[0]), whole.eval()(images()[0]))
    for name, value in get_model_state_dict(model, options=options).items():
        close(value, whole.state_dict()[name])


def checkpointed_in_shards(form):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    model, other = fully_shard(made(form), mesh=mesh()), Case(ARCH, form).make()
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder[0])
    fully_shard(other, mesh=mesh())
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder[0])
    other.load_state_dict(state["model"])
    close(other.eval()(images()[0]), model.eval()(images()[0]))


def sharded_optimizer(form):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(made(form))
    optimizer = ZeroRedundancyOptimizer([p for p in model.parameters() if p.requires_grad], torch.optim.AdamW)
    backward(model)
    optimizer.step()
    assert torch.isfinite(model(images()[0])).all()


def head_on_a_mesh(form):
    """Tensor parallelism begins by making every parameter a DTensor, here a copy in each process."""
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    model = made(form)
    head = heads(model)[0][1]
    x = torch.randn(4, head.in_features, generator=torch.Generator().manual_seed(3))
    wanted = head(x)
    wanted.square().mean().backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    head.zero_grad()
    head = distribute_module(head, mesh())
    out = head(distribute_tensor(x, mesh(), [Replicate()]))
    close(out.full_tensor(), wanted)
    out.square().mean().backward()
    for name, p in head.named_parameters():
        if p.grad is not None:
            close(p.grad.full_tensor(), gradients[name], 1e-2)


def images_of_a_mesh(form):
    """As above, with images in shards."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    head = heads(made(form))[0][1].eval()
    x = torch.randn(4, head.in_features, generator=torch.Generator().manual_seed(3))
    wanted = head(x)
    close(distribute_module(head, mesh())(distribute_tensor(x, mesh(), [Shard(0)])).full_tensor(), wanted)


def sharded_as_a_wrapper_by_size(form):
    import functools

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    policy = functools.partial(size_based_auto_wrap_policy, min_num_params=30)
    model = FullyShardedDataParallel(
        made(form), auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    backward(model)
    assert torch.isfinite(model(images()[0])).all()


def losses_on_a_sharded_head(form):
    """Losses that share a head read its parameters outside of the model."""
    from torch.distributed.fsdp import fully_shard

    from timm_faim import FAIMInfoNCELoss, FAIMMarginLoss

    if form is None:
        return
    whole, sharded = heads(made(form))[0][1], heads(made(form))[0][1]
    fully_shard(sharded, mesh=mesh())
    x = torch.randn(8, whole.in_features, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(8) % 2
    for head in (whole, sharded):
        (FAIMInfoNCELoss(head)(x, labels) + FAIMMarginLoss(head=head)(x, labels)).backward()
    for a, b in zip(whole.parameters(), sharded.parameters(), strict=True):
        if a.grad is not None:
            close(b.grad.full_tensor(), a.grad, 1e-2)


HABITS = (
    replicated,
    replicated_statically,
    fully_sharded,
    the_head_sharded_alone,
    every_part_sharded_alone,
    sharded_from_the_meta_device,
    checkpointed_in_shards,
    sharded_optimizer,
    head_on_a_mesh,
    images_of_a_mesh,
    sharded_as_a_wrapper_by_size,
    losses_on_a_sharded_head,
)


def outcomes(form, folder):
    """Every habit in one group of processes, which is what takes time; a line for each that fails."""
    import traceback

    lines = []
    for habit in HABITS:
        try:
            habit(form)
        except Exception:
            lines.append(f"{habit.__name__}: {traceback.format_exc(limit=-3)}")
    with open(f"{folder}/{dist.get_rank()}", "w") as file:
        file.write("\0".join(lines))


def failed(form, folder):
    in_group(outcomes, form, str(folder))
    lines = [line for rank in range(2) for line in (folder / str(rank)).read_text().split("\0") if line]
    return {line.partition(":")[0]: line for line in lines}


@pytest.fixture(scope="module")
def failed_with_timms_own(tmp_path_factory):
    return failed(None, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("form", FORMS)
def test_habits(form, tmp_path, failed_with_timms_own):
    ours = failed(form, tmp_path)
    assert not ours.keys() - failed_with_timms_own.keys(), "\n".join(ours.values())


def test_what_timms_own_models_cannot(failed_with_timms_own):
    assert failed_with_timms_own.keys() <= {"sharded_as_a_wrapper_by_size"}, "\n".join(failed_with_timms_own.values())
