"""The parts of a model and their learning rates."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import timm_faim  # noqa: F401  (registers the faim_ models)
from timm_faim.training.freeze import LearningOptions
from timm_faim.training.optimiser import learning_rates, parts_of, sizes_of_parts, split_groups


def build(name="faim_test_resnet", opt="adamw", layer_decay=None, **scales):
    options = {"faim_cfg": {"preset": "flat"}} if name.startswith("faim_") else {}
    model = timm.create_model(name, num_classes=3, **options)
    optimizer = create_optimizer_v2(model, opt, lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    split_groups(optimizer, model, LearningOptions(**scales))
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"full_sigma": True}, {"prior": True}])
def test_every_parameter_of_the_head_has_its_part(options):
    model = timm.create_model("faim_test_resnet", num_classes=3, faim_cfg={"preset": "flat", **options})
    parts = parts_of(model)
    named = {name: parts.get(id(p), "backbone") for name, p in model.named_parameters()}
    head = {name.removeprefix("fc."): part for name, part in named.items() if name.startswith("fc.")}
    expected = {
        "mu": "mu",
        "scale": "gamma",
        "metric.beta": "beta",
        "metric.lmbda": "lambda",
        "metric.L" if options.get("full_sigma") else "metric.log_sigma_diag": "sigma",
    }
    assert head == expected | ({"prior": "gamma"} if options.get("prior") else {})
    assert {part for name, part in named.items() if not name.startswith("fc.")} == {"backbone"}


def test_a_linear_classifier_counts_as_mu():
    model, optimizer = build("test_resnet", lr_scale_backbone=0.1)
    assert sizes_of_parts(optimizer) == {
        "backbone": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("fc.")),
        "mu": sum(p.numel() for p in model.fc.parameters()),
    }
    rates = learning_rates(optimizer)
    assert rates == pytest.approx({"backbone": 0.01, "mu": 0.1})


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lookahead_adamw", "lamb"])
def test_splitting_keeps_every_parameter_once_and_its_weight_decay(opt):
    model, optimizer = build(opt=opt)
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(members) == len(list(model.parameters())) == len({id(p) for p in members})
    whole = create_optimizer_v2(model, opt, lr=0.1, weight_decay=0.05)
    decays, expected = (
        {id(p): group["weight_decay"] for group in o.param_groups for p in group["params"]} for o in (optimizer, whole)
    )
    assert decays == expected and set(decays.values()) == {0.0, 0.05}
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    before = model.fc.mu.clone()
    optimizer.step()
    assert not torch.equal(before, model.fc.mu)


def test_rates_of_the_parts_multiply_layer_decay_and_schedule():
    model, optimizer = build(layer_decay=0.5, lr_scale_mu=3.0, lr_scale_scalars=2.0)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=0)
    for epoch in (0, 2):
        scheduler.step(epoch)
        base = {0: 0.1, 2: 0.05}[epoch]
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[id(model.fc.mu)] == pytest.approx(base * 3.0)
        assert rates[id(model.fc.scale)] == pytest.approx(base * 2.0)
        assert rates[id(model.fc.metric.lmbda)] == pytest.approx(base * 2.0)
        assert rates[id(model.fc.metric.beta)] == pytest.approx(base)
        first = next(p for p in model.parameters() if p.requires_grad)
        assert rates[id(first)] < base * 0.6
