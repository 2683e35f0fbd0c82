"""The three stages and the learning rates of the parts."""
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import timm_faim  # noqa: F401  (registers the faim_ models)
from timm_faim.training.errors import UserError
from timm_faim.training.stages import (
    StageSchedule,
    build_stages,
    describe,
    learning_rates,
    parts_of,
    sizes_of_parts,
    split_groups,
)

SCALES = dict(lr_scale_backbone=1.0, lr_scale_mu=1.0, lr_scale_metric=1.0, lr_scale_scalars=1.0, lr_scale_lambda=None)
SCHEDULE = StageSchedule(warm_up_end=2, tune_metric_end=6, freeze_gamma=True)


def build(name="faim_test_resnet", opt="adamw", layer_decay=None, **scales):
    options = {"faim_cfg": {"preset": "flat"}} if name.startswith("faim_") else {}
    model = timm.create_model(name, num_classes=3, **options)
    optimizer = create_optimizer_v2(model, opt, lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    split_groups(optimizer, model, SimpleNamespace(**SCALES | scales))
    return model, optimizer


@pytest.mark.parametrize("options", [{}, {"full_sigma": True}, {"prior": True}])
def test_every_parameter_of_the_head_has_its_part(options):
    model = timm.create_model("faim_test_resnet", num_classes=3, faim_cfg={"preset": "flat", **options})
    parts = parts_of(model)
    named = {name: parts.get(id(p), "backbone") for name, p in model.named_parameters()}
    head = {name.removeprefix("fc."): part for name, part in named.items() if name.startswith("fc.")}
    expected = {"mu": "mu", "scale": "gamma", "metric.beta": "beta", "metric.lmbda": "lambda",
                "metric.L" if options.get("full_sigma") else "metric.log_sigma_diag": "sigma"}
    assert head == expected | ({"prior": "gamma"} if options.get("prior") else {})
    assert {part for name, part in named.items() if not name.startswith("fc.")} == {"backbone"}


def test_a_linear_classifier_counts_as_mu():
    model, optimizer = build("test_resnet", lr_scale_backbone=0.1)
    assert sizes_of_parts(optimizer) == {
        "backbone": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("fc.")),
        "mu": sum(p.numel() for p in model.fc.parameters())}
    rates = learning_rates(optimizer, None, 0)
    assert rates == pytest.approx({"backbone": 0.01, "mu": 0.1})


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lookahead_adamw", "lamb"])
def test_splitting_keeps_every_parameter_once_and_its_weight_decay(opt):
    model, optimizer = build(opt=opt)
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(members) == len(list(model.parameters())) == len({id(p) for p in members})
    whole = create_optimizer_v2(model, opt, lr=0.1, weight_decay=0.05)
    decays, expected = ({id(p): group["weight_decay"] for group in o.param_groups for p in group["params"]}
                        for o in (optimizer, whole))
    assert decays == expected and set(decays.values()) == {0.0, 0.05}
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    before = model.fc.mu.clone()
    optimizer.step()
    assert not torch.equal(before, model.fc.mu)


def test_rates_of_the_parts_multiply_layer_decay_and_schedule():
    model, optimizer = build(layer_decay=0.5, lr_scale_mu=3.0, lr_scale_scalars=2.0, lr_scale_lambda=5.0)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=0)
    for epoch in (0, 2):
        scheduler.step(epoch)
        base = {0: 0.1, 2: 0.05}[epoch]
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[id(model.fc.mu)] == pytest.approx(base * 3.0)
        assert rates[id(model.fc.scale)] == pytest.approx(base * 2.0)
        assert rates[id(model.fc.metric.lmbda)] == pytest.approx(base * 5.0)
        assert rates[id(model.fc.metric.beta)] == pytest.approx(base)
        first = next(p for p in model.parameters() if p.requires_grad)
        assert rates[id(first)] < base * 0.6


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_a_frozen_part_does_not_move_and_keeps_its_state(opt):
    """Not even by weight decay or by momentum from before."""
    model, optimizer = build(opt=opt, lr_scale_mu=2.0)
    head = model.fc
    frozen = {"sigma": head.metric.log_sigma_diag, "beta": head.metric.beta, "lambda": head.metric.lmbda,
              "gamma": head.scale}

    def update(number):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        with SCHEDULE.update(optimizer, number):
            optimizer.step()
        return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}

    fine = update(10)
    assert {"fc.mu", "fc.scale", "fc.metric.beta", "fc.metric.lmbda", "fc.metric.log_sigma_diag"} <= fine
    kept = {name: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
            for name, p in frozen.items()}
    moved = update(0)
    assert {name for name in moved if name.startswith("fc.")} == {"fc.mu"}
    for name, p in frozen.items():
        assert all(torch.equal(v, optimizer.state[p][k]) for k, v in kept[name].items())
    assert "fc.metric.log_sigma_diag" in update(2)


def test_rate_of_sigma_rises_and_rates_come_back():
    _, optimizer = build()
    seen = []
    for number in range(8):
        with SCHEDULE.update(optimizer, number):
            seen.append(next(g["lr"] for g in optimizer.param_groups if g["part"] == "sigma"))
        assert {group["lr"] for group in optimizer.param_groups} == {0.1}
        assert learning_rates(optimizer, SCHEDULE, number)["sigma"] == seen[-1]
    assert seen == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_names_and_label_smoothing_of_the_stages():
    assert [SCHEDULE.stage(n) for n in (0, 1, 2, 5, 6)] == ["warm-up"] * 2 + ["tune-metric"] * 2 + ["fine-tune"]
    assert [SCHEDULE.smooths_labels(n) for n in (0, 5, 6)] == [False, False, True]
    assert SCHEDULE.factor("gamma", 0) == 0 and StageSchedule(2, 6).factor("gamma", 0) == 1


@pytest.mark.parametrize(("stages", "expected"), [
    ([2.0, 3.0], (20, 50)), ([0.1, 0.4], (10, 50)), ([0.1, 3.0], (10, 40)), ([0.0, 5.0], (0, 50)),
    ([0.0, 10.0], (0, 100)),
])
def test_stages_in_epochs_or_fractions(stages, expected):
    schedule = build_stages(SimpleNamespace(stages=stages, freeze_gamma=False), updates_per_epoch=10, epochs=10)
    assert (schedule.warm_up_end, schedule.tune_metric_end) == expected


@pytest.mark.parametrize("stages", [None, [0.0, 0.0]])
def test_stages_off(stages):
    assert build_stages(SimpleNamespace(stages=stages, freeze_gamma=False), 10, 10) is None


def test_stages_longer_than_the_run():
    with pytest.raises(UserError, match=r"--stages 5 20 are longer than the 12 epochs.*fractions"):
        build_stages(SimpleNamespace(stages=[5.0, 20.0], freeze_gamma=False), 10, 12)


def test_description_leaves_out_skipped_stages():
    lines = describe(StageSchedule(0, 20), updates_per_epoch=10, epochs=4)
    assert [line.split(":")[0] for line in lines] == ["tune-metric", "fine-tune"]
    assert "epochs 0 to 2;" in lines[0] and "epochs 2 to 4;" in lines[1]
