"""What people do with any PyTorch model."""

import copy
import io
import pickle

import pytest
import torch
from habits import Case, cases, close, heads, listed, parity, step, tensors
from torch import nn


def written(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


def state_dict_by_file(case):
    model, other = case.make(), case.make()
    other.load_state_dict(written(model.state_dict(), weights_only=True))
    case.same(other, model)


def whole_model_by_file(case):
    model = case.make()
    case.same(written(model, weights_only=False), model)


def pickled(case):
    model = case.make()
    case.same(pickle.loads(pickle.dumps(model)), model)


def deepcopied(case):
    model = case.make()
    copied = copy.deepcopy(model)
    case.same(copied, model)
    step(copied, case.x())


def safetensors_of_a_model(case):
    import tempfile

    from safetensors.torch import load_model, save_model

    model, other = case.make(), case.make()
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        save_model(model, file.name)
        assert load_model(other, file.name) == (set(), [])
    case.same(other, model)


def empty_then_loaded(case):
    model = case.make()
    with torch.device("meta"):
        other = case.make()
    other.to_empty(device="cpu")
    for module in other.modules():  # timm's convention for buffers that no file holds
        getattr(module, "init_non_persistent_buffers", lambda: None)()
    other.load_state_dict(model.state_dict())
    for module in other.modules():
        getattr(module, "init_non_persistent_buffers", lambda: None)()
    case.same(other, model)


def meta_assigned_then_moved(case):
    model = case.make()
    with torch.device("meta"):
        other = case.make()
    other.load_state_dict(model.state_dict(), assign=True)
    for module in other.modules():
        getattr(module, "init_non_persistent_buffers", lambda: None)()
    if any(buffer.is_meta for buffer in other.buffers()):
        raise NotImplementedError("timm's own buffers")
    case.same(other.to("cpu"), model)


def meta_then_reset_module_by_module(case):
    with torch.device("meta"):
        model = case.make()
    for order in (list(model.modules()), list(model.modules())[::-1]):
        for module in order:
            if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data.fill_(99)
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        for name, head in heads(model):
            assert all(tensor.abs().max() < 98 for tensor in tensors(head).values()), name
            if case.form is not None:
                fresh = dict(head_like(head).metric.named_parameters())
                for key in ("log_sigma_diag", "L", "lmbda"):
                    if key in fresh:
                        close(dict(head.metric.named_parameters())[key], fresh[key])


def head_like(head):
    from timm_faim import FAIMHead

    return FAIMHead(
        head.in_features,
        head.num_classes,
        space=head.space,
        full_sigma=head.full_sigma,
        init=head.init,
        lambda_init=head.metric.lambda_init,
        symmetric=head.metric.symmetric,
    )


def bfloat16(case):
    assert case.make().to(torch.bfloat16)(case.x().bfloat16()).dtype == torch.bfloat16


def float64(case):
    model = case.make()
    close(copy.deepcopy(model).double()(case.x().double()).float(), model(case.x()))


def channels_last(case):
    model = case.make()
    close(copy.deepcopy(model).to(memory_format=torch.channels_last)(case.x()), model(case.x()))


def autocast(case):
    model = case.make()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    step(model, case.x(), forward)


def inference_mode(case):
    with torch.inference_mode():
        assert case.make()(case.x()).is_inference()


def default_dtype_float64(case):
    torch.set_default_dtype(torch.float64)
    try:
        assert case.make()(case.x().double()).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def no_images(case):
    assert case.make()(case.x()[:0]).shape[0] == 0


def hooks_on_every_module(case):
    model, called = case.make(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: called.add(name))
    model(case.x())
    assert {name for name, _ in heads(model)} <= called


def backward_hooks_on_every_module(case):
    model = case.make()
    for module in model.modules():
        module.register_full_backward_hook(lambda m, grad_in, grad_out: None)
    step(model, case.x())


def stochastic_averages(case):
    model = case.make()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    case.same(average.module, model)


def parameters_of_each_module_only_in_its_forward(case):
    """Offloading and sharding give a module its parameters just before its ``forward`` and take them back after."""
    model = case.make()
    wanted = model(case.x())
    for module in model.modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        buffers = {name: b for name, b in module._buffers.items() if b is not None}
        if own or buffers:
            lend(module, own, buffers)
    close(model(case.x()), wanted)


def lend(module, own, buffers):
    def take():
        module._parameters.update({name: nn.Parameter(p.to("meta"), p.requires_grad) for name, p in own.items()})
        module._buffers.update({name: b.to("meta") for name, b in buffers.items()})

    def give(*_):
        module._parameters.update(own)
        module._buffers.update(buffers)

    module.register_forward_pre_hook(give)
    module.register_forward_hook(lambda *_: take())
    take()


def replicas(case):
    """What nn.DataParallel makes of a model: shallow copies whose parameters are plain tensors."""
    model = case.make()
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for key, child in module._modules.items():
            setattr(twin, key, None if child is None else copies[child])
        for key, parameter in module._parameters.items():
            setattr(twin, key, None if parameter is None else parameter * 1.0)
        for key, buffer in module._buffers.items():
            setattr(twin, key, None if buffer is None else buffer.clone())
    for module in model.modules():  # the originals are elsewhere
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.detach().to("meta"))
    wanted = case.make()
    wanted.load_state_dict(dict(state_of(copies[model])), strict=False)
    case.same(copies[model], wanted)


def state_of(replica, prefix=""):
    for key, value in vars(replica).items():
        if isinstance(value, torch.Tensor):
            yield prefix + key, value.detach()
    for key, buffer in replica._buffers.items():
        if buffer is not None:
            yield prefix + key, buffer
    for key, child in replica._modules.items():
        if child is not None:
            yield from state_of(child, f"{prefix}{key}.")


def shared_memory(case):
    assert case.make().share_memory()(case.x()).shape == (2, 5)


def pruned(case):
    from torch.nn.utils import prune

    model = case.make()
    for module in model.modules():
        for name in ("weight", "mu"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                prune.l1_unstructured(module, name, amount=0.3)
    step(model, case.x())


def as_one_vector(case):
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    model = case.make()
    wanted = model(case.x())
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())
    case.same(model, wanted)


def counted_operations(case):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        case.make()(case.x())
    assert counter.get_total_flops() > 0


def synchronised_norms(case):
    nn.SyncBatchNorm.convert_sync_batchnorm(case.make())(case.x())


def adapters_by_subclass(case):
    """Low-rank adapters and quantisers put other layers in the place of linear ones."""
    model = case.make()
    wanted = model(case.x())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Wrapped(child))
    case.same(model, wanted)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return self.inner(x)


def test_a_metric_that_blocks_share_is_no_part_of_a_replica():
    """A limit: all but the first chart go on with the metric of the model itself."""
    with pytest.raises(Exception, match="meta|device"):
        replicas(Case("test_vit", "shared"))


def test_copies_of_data_parallel_say_that_moments_do_not_work_in_them():
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replicas(Case("test_resnet", "moments"))


HABITS = listed(globals(), __name__)
LIMITS = {("replicas", "moments"): "hooks of a copy are those of the model itself"}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("habit", "case"), cases(HABITS))
def test_habit(habit, case):
    parity(habit, case, LIMITS)
