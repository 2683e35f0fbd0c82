"""What PyTorch's compilers, tracers and function transforms do with a model."""

import copy
import io

import pytest
import torch
from habits import cases, close, heads, listed, parity, step, tensors
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names


def compiled(case):
    torch._dynamo.reset()
    model = case.make()
    case.same(torch.compile(model, backend="aot_eager", fullgraph=True), model)
    step(model, case.x(), torch.compile(model, backend="aot_eager"))


def exported_and_written(case):
    model = case.make()
    program = torch.export.export(model, (case.x(),), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=64)},))
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    case.same(torch.export.load(file).module(), model, count=3)


def traced(case):
    model = case.make()
    case.same(torch.jit.trace(model, case.x()), model)


def symbolically_traced(case):
    model = case.make()
    case.same(torch.fx.symbolic_trace(model), model)


def torchvision_extractor(case):
    model = case.make()
    names = get_graph_node_names(model)[1]
    last = heads(model)[0][0]
    assert last in names
    net = create_feature_extractor(model, [last])
    assert torch.isfinite(net(case.x())[last]).all()
    step(net, case.x(), lambda x: net(x)[last].flatten(1))
    copy.deepcopy(net)


def called_with_parameters(case):
    model = case.make()
    state = {name: t.clone() for name, t in tensors(model).items()}
    case.same(lambda x: functional_call(model, state, (x,)), model)


def loss_of(model):
    buffers = dict(model.named_buffers())

    def loss(parameters, x):
        return functional_call(model, (parameters, buffers), (x,)).square().mean()

    return loss


def functional_gradients(case):
    model = case.make()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    got = grad(loss_of(model))(parameters, case.x())
    model(case.x()).square().mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(got[name], p.grad, 1e-2)


def gradients_of_each_image(case):
    model = case.make()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    each = vmap(grad(lambda p, x: loss_of(model)(p, x[None])), (None, 0))(parameters, case.x())
    one = grad(loss_of(model))(parameters, case.x()[1:])
    for name, value in one.items():
        close(each[name][1], value, 1e-2)


def forward_derivatives(case):
    model = case.make()
    x = case.x()
    _, out = jvp(model, (x,), (torch.ones_like(x),))
    assert torch.isfinite(out).all()


def forward_derivatives_by_dual_numbers(case):
    model, x = case.make(), case.x()
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.isfinite(torch.autograd.forward_ad.unpack_dual(out).tangent).all()


def jacobian(case):
    assert jacrev(case.make())(case.x(1)).shape[:2] == (1, 5)


def ensemble(case):
    models = [case.make() for _ in range(2)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    outputs = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), (0, 0, None))(parameters, buffers, case.x())
    close(outputs[1], models[1](case.x()))


def second_derivatives(case):
    model, x = case.make(), case.x().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def checkpointed(case):
    model = case.make()
    step(model, case.x(), lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))


HABITS = listed(globals(), __name__)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("habit", "case"), cases(HABITS, heavy=("compiled", "exported_and_written")))
def test_habit(habit, case):
    parity(habit, case, {})
