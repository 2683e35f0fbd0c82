"""Closed-form conversions: linear layers to FAIM heads and back, models to their twins, pretrained=True."""

import copy
import logging

import pytest
import timm
import torch
from cases import SIGMAS, flat
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn

from timm_faim import FAIMHead, agreement, convert_, faim_heads, from_linear, to_linear
from timm_faim.head.convert import estimated_norm, probe_features
from timm_faim.models.attach import classifier_layers
from timm_faim.models.convert import _classifier_inputs

SEEDS = [0, 1, 2]
MARGIN = 0.005  # in logits: the float32 promise of from_linear's docstring


def layer(C, D, *, bias=True, conv=False, dtype=torch.float32, seed=0):
    """A classifier of trained scale: |w| of 2 as in ImageNet checkpoints, whatever D, and small biases."""
    generator = torch.Generator().manual_seed(seed)
    made = nn.Conv2d(D, C, 1, bias=bias) if conv else nn.Linear(D, C, bias=bias)
    with torch.no_grad():
        made.weight.normal_(std=2.0 / D**0.5, generator=generator)
        if bias:
            made.bias.normal_(std=0.1, generator=generator)
    return made.to(dtype)


def decided(linear, features, margin=MARGIN):
    """Which features have a best class that leads by more than ``margin``."""
    logits = features.double() @ linear.weight.flatten(1).double().t()
    if linear.bias is not None:
        logits = logits + linear.bias.double()
    first, second = logits.topk(2).values.unbind(-1)
    return first - second > margin


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("C", "D"), [(2, 16), (10, 64), (100, 256), (200, 200), (1000, 1280)])
def test_exact_without_a_prior_where_classes_are_no_more_than_features(C, D, seed):
    linear = layer(C, D, dtype=torch.float64, seed=seed)
    x = probe_features(linear)
    head = from_linear(linear)
    assert head.prior is None and head.mu.dtype == torch.float64
    got = agreement(head, linear, x)
    assert got["top1"] == got["top5"] == 100.0 and 0 <= got["kl"] < 1e-3
    narrow = linear.float()
    head = from_linear(narrow)
    sure = decided(narrow, x)
    assert agreement(head, narrow, x[sure])["top1"] == 100.0
    assert agreement(head, narrow, x)["kl"] < 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_one_class_more_than_features_keeps_the_argmax_without_a_prior(seed):
    linear = layer(33, 32, dtype=torch.float64, seed=seed)
    head = from_linear(linear, prior=False)
    x = probe_features(linear)
    assert head.prior is None
    assert agreement(head, linear, x)["top1"] == 100.0
    assert agreement(from_linear(linear), linear, x)["kl"] < agreement(head, linear, x)["kl"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("C", "D"), [(33, 32), (200, 64), (1000, 384)])
def test_with_a_prior_only_the_least_spread_direction_is_lost(C, D, seed):
    linear = layer(C, D, seed=seed)
    x = probe_features(linear)
    head = from_linear(linear)
    assert head.prior is not None and head.prior.mean().abs() < 1e-4
    without = layer(C, D, seed=seed)
    with torch.no_grad():
        centred = (linear.weight - linear.weight.mean(0)).double()
        least = torch.linalg.svd(centred, full_matrices=False).Vh[-1].float()
        without.weight -= torch.outer(linear.weight @ least, least)
    lost, kept = agreement(head, linear, x), agreement(head, without, x)
    assert kept["top1"] > 99.0 and kept["kl"] < 1e-3
    assert kept["kl"] < lost["kl"] < 0.1


@pytest.mark.parametrize("C", [10, 300])
def test_a_direction_that_no_class_uses_costs_nothing(C):
    linear = layer(C, 64)
    with torch.no_grad():
        linear.weight[:, 5] = 0.3  # all classes alike: trained classifiers have directions close to this
    x = probe_features(linear)
    assert agreement(from_linear(linear), linear, x[decided(linear, x)])["top1"] > 99.5


@pytest.mark.parametrize(("C", "D"), [(10, 64), (300, 64)])
@pytest.mark.parametrize("options", [dict(bias=False), dict(conv=True), dict(bias=False, conv=True)])
def test_bias_free_and_convolutional_classifiers(C, D, options):
    linear = layer(C, D, **options)
    x = probe_features(linear).float()
    head = from_linear(linear)
    reference = nn.Linear(D, C, bias=options.get("bias", True))
    with torch.no_grad():
        reference.weight.copy_(linear.weight.flatten(1))
        if linear.bias is not None:
            reference.bias.copy_(linear.bias)
    assert agreement(head, linear, x) == agreement(head, reference, x)
    assert torch.equal(from_linear(reference).mu, head.mu)
    if linear.weight.dim() == 4:
        image = x[:6].reshape(2, 3, 1, D).permute(0, 3, 1, 2)
        assert head(image).shape == linear(image).shape
        assert torch.allclose(head(image)[1, :, 2, 0], head(x[5]), atol=0.01)


@pytest.mark.parametrize(("C", "D"), [(50, 128), (300, 256)])
@pytest.mark.parametrize("factor", [1 / 3, 3])
def test_a_norm_that_is_wrong_by_a_factor_of_three(C, D, factor):
    linear = layer(C, D)
    x = probe_features(linear)
    head = from_linear(linear, feature_norm=factor * x.norm(dim=1).mean().item())
    got = agreement(head, linear, x)
    assert got["top1"] > 99.0 and got["top5"] > 95.0 and got["kl"] < 5e-3
    assert (got["top1"] == 100.0) or C > D or not decided(linear, x).all()


@pytest.mark.parametrize("scale", [1e-2, 1e3])
@pytest.mark.parametrize("C", [50, 300])
def test_conversion_does_not_depend_on_the_unit_of_the_features(C, scale):
    linear, scaled = layer(C, 128), layer(C, 128)
    with torch.no_grad():
        scaled.weight.div_(scale)
    x = probe_features(linear)
    assert estimated_norm(scaled.weight.double()) == pytest.approx(scale * estimated_norm(linear.weight.double()))
    one, other = agreement(from_linear(linear), linear, x), agreement(from_linear(scaled), scaled, x * scale)
    assert other["top1"] == pytest.approx(one["top1"], abs=0.5)
    assert other["kl"] == pytest.approx(one["kl"], rel=0.3)


@pytest.mark.parametrize("C", [50, 300])
def test_calibration_measures_what_is_estimated_otherwise(C):
    """Features ten times as long as the weights suggest, away from the origin: the estimate alone is off."""
    linear = layer(C, 128)
    center = torch.randn(128, generator=torch.Generator().manual_seed(1))
    x = 10 * (probe_features(linear) + 0.3 * center)
    guessed, measured = from_linear(linear), from_linear(linear, features=x[:256])
    distances = torch.cdist(x[:256].double(), measured.mu.double())
    a = (measured.mu[0] - measured.mu[1]).norm() / (linear.weight[0] - linear.weight[1]).norm()
    assert measured.scale.item() == pytest.approx((distances.mean() / a).item(), rel=1e-3)
    good, poor = agreement(measured, linear, x[256:]), agreement(guessed, linear, x[256:])
    assert good["kl"] < 0.2 * poor["kl"]
    assert good["top1"] == 100.0 if C < 128 else good["top1"] >= poor["top1"]


@pytest.mark.parametrize("full", SIGMAS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_options_of_the_head(full, symmetric):
    linear = layer(20, 64, dtype=torch.float64).eval()
    cfg = dict(full_sigma=full, symmetric=symmetric, margin=0.2, learn_scale=False, prior=True, eps=1e-4)
    head = from_linear(linear, faim_cfg=cfg)
    assert head.prior is not None and head.margin == 0.2 and not head.scale.requires_grad and not head.training
    assert torch.allclose(head.metric.sigma(), torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-12)
    assert agreement(head, linear, probe_features(linear))["top1"] > 99.5
    back = to_linear(head)
    assert agreement(head, back, probe_features(linear))["top1"] > 99.5


def test_lambda_leaves_zero_in_training():
    head = from_linear(layer(20, 64))
    assert head.metric.lmbda.item() == 0 and head.metric.beta.abs().max() > 0
    x = probe_features(layer(20, 64), 32).float()
    nn.functional.cross_entropy(head(x), torch.arange(32) % 20).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert head.metric.lmbda.grad.abs() > 0


def test_nearly_dependent_classes_get_a_prior():
    """Two classes of the same weights and different biases: no prototypes without a prior can tell them apart.

    The prior takes e_k up at the mean radius; a feature's own radius differs by at most |x| / |t|, in whatever
    direction the machine's LAPACK has chosen t among those that no class uses. Decisions by more than that are kept.
    """
    linear = layer(20, 64)
    with torch.no_grad():
        linear.weight[1] = linear.weight[0]
        linear.bias[1] = linear.bias[0] + 1.0
    head = from_linear(linear)
    x = probe_features(linear)
    assert head.prior is not None
    shift = head.mu.mean(0).norm().item()  # t, as the scaled weights are small beside it
    bound = 2.0 * (head.prior.max() - head.prior.min()).item() * x.norm(dim=1).max().item() / shift
    sure = decided(linear, x, bound + MARGIN)
    assert sure.float().mean() > 0.5
    assert agreement(head, linear, x[sure])["top1"] == 100.0
    assert agreement(from_linear(linear, prior=False), linear, x[sure])["top1"] < 100.0


def test_weights_that_tell_no_classes_apart():
    linear = nn.Linear(16, 5)
    nn.init.zeros_(linear.weight)
    head = from_linear(linear)
    x = torch.randn(20, 16)
    assert (head(x).log_softmax(-1) - linear(x).log_softmax(-1)).abs().max() < 0.05


def test_least_squares_above_the_limit_is_worse_than_the_prior():
    linear = layer(300, 64, dtype=torch.float64)
    with torch.no_grad():
        linear.bias.mul_(20.0)  # what the shift alone cannot express
        linear.weight[:, 0] = 0.0  # where the prior loses nothing
    x = probe_features(linear)
    fitted = from_linear(linear, prior=False)
    assert fitted.prior is None
    assert agreement(fitted, linear, x)["top1"] < 95.0 < 99.0 < agreement(from_linear(linear), linear, x)["top1"]


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 80.0), (torch.bfloat16, 55.0)])
def test_half_precision_keeps_the_dtype_and_most_decisions(dtype, least):
    linear = layer(100, 256, dtype=dtype)
    head = from_linear(linear)
    assert all(p.dtype == dtype for p in head.parameters())
    assert agreement(head, linear, probe_features(linear))["top1"] > least
    assert to_linear(head).weight.dtype == dtype


def test_device_and_dtype_are_kept(device):
    linear = layer(10, 32).to(device)
    head = from_linear(linear)
    assert head.mu.device.type == device and to_linear(head).weight.device.type == device
    assert agreement(head, linear, probe_features(linear).to(device))["kl"] < 1e-3


@pytest.mark.parametrize(("C", "D"), [(10, 64), (300, 64)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_round_trip(C, D, calibrated):
    linear = layer(C, D, dtype=torch.float64)
    x = probe_features(linear)
    features = x if calibrated else None
    head = from_linear(linear, features=features)
    back = to_linear(head, features)
    assert isinstance(back, nn.Linear) and agreement(head, back, x)["top1"] > 99.5
    assert agreement(head, back, x)["kl"] < 1e-3
    if C <= D:
        for one, other in ((back.weight, linear.weight), (back.bias, linear.bias)):
            one, other = one - one.mean(0), other - other.mean(0)
            assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("full", SIGMAS)
def test_to_linear_keeps_the_argmax_of_any_head_without_prior(full):
    head = flat(64, 30, lambda_init=0.0, full_sigma=full, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (head.metric.L, head.metric.log_sigma_diag):
            if parameter is not None:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(500, 64, dtype=torch.float64) + 1.0
    linear = to_linear(head)
    assert torch.equal(linear(x).argmax(-1), head(x).argmax(-1))
    assert torch.equal(to_linear(head, x)(x).argmax(-1), head(x).argmax(-1))
    assert agreement(head, to_linear(head, x), x)["kl"] < agreement(head, linear, x)["kl"]


def test_to_linear_of_a_head_on_the_sphere():
    head = FAIMHead(64, 10, space="sphere", dtype=torch.float64)
    x = torch.randn(500, 64, dtype=torch.float64) * 3.0
    linear = to_linear(head, x)
    assert torch.equal(linear(x).argmax(-1), head(x).argmax(-1))
    assert linear.bias.abs().max() < 1e-9
    assert agreement(head, linear, x)["kl"] < 0.2 * agreement(head, to_linear(head), x)["kl"]


def test_to_linear_says_why_it_cannot():
    with pytest.raises(ValueError, match="λ = 0.1 has a 1-form.*lambda_init=0"):
        to_linear(flat(8, 3))
    with pytest.raises(ValueError, match=r"features \[N, 8\].*\[4, 7\]"):
        to_linear(FAIMHead(8, 3), torch.ones(4, 7))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dict(space="sphere"), "space='sphere'.*leave space out"),
        (dict(preset="indicatrix"), "preset='indicatrix'.*becomes a head of preset 'flat'; leave preset out"),
        (dict(lambda_init=0.1), "lambda_init=0.1.*leave lambda_init out"),
        (dict(preset="flat", init="seed"), "init='seed'.*leave init out"),
        (dict(scale_init=24.0), "scale_init=24.0.*leave scale_init out"),
        (dict(eps=1.0), "eps=1.0.*leave eps out"),
    ],
)
def test_options_that_contradict_a_conversion(cfg, message, caplog):
    with pytest.raises(ValueError, match=message):
        from_linear(layer(5, 8), faim_cfg=cfg)
    with pytest.raises(ValueError, match=message):
        convert_(timm.create_model("test_vit"), faim_cfg=cfg)
    caplog.set_level(logging.INFO, "timm_faim")
    state_dict = trained("test_vit", 7).state_dict()
    overlay = dict(state_dict=state_dict, num_classes=7)
    given = dict(pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    with pytest.raises(ValueError, match=f"{message}.* or start a fresh head with pretrained_head='fresh'"):
        timm.create_model("faim_test_vit", faim_cfg=cfg | {"preset": cfg.get("preset", "flat")}, **given)
    model = timm.create_model("faim_test_vit", faim_cfg={"preset": "flat"} | cfg, pretrained_head="fresh", **given)
    assert model.faim_cfg[next(iter(cfg))] == next(iter(cfg.values()))
    (record,) = caplog.records
    assert "head starts fresh: as asked for by pretrained_head='fresh'" in record.getMessage()


def test_bad_layers_and_features():
    with pytest.raises(TypeError, match="nn.Linear.*Conv2d.*3"):
        from_linear(nn.Conv2d(8, 5, 3))
    with pytest.raises(TypeError, match="nn.Linear.*Identity"):
        from_linear(nn.Identity())
    with pytest.raises(ValueError, match="at least 2 outputs, got 1"):
        from_linear(nn.Linear(8, 1))
    with pytest.raises(ValueError, match="meta device"):
        from_linear(nn.Linear(8, 5, device="meta"))
    with pytest.raises(ValueError, match=r"features \[N, 8\].*\[3, 7\]"):
        from_linear(nn.Linear(8, 5), features=torch.ones(3, 7))
    with pytest.raises(ValueError, match=r"N >= 1, got \[0, 8\]"):
        from_linear(nn.Linear(8, 5), features=torch.ones(0, 8))
    with pytest.raises(ValueError, match="features contain NaN"):
        from_linear(nn.Linear(8, 5), features=torch.full((3, 8), torch.nan))
    with pytest.raises(ValueError, match="feature_norm.*got 0.0.*all zero"):
        from_linear(nn.Linear(8, 5), features=torch.zeros(3, 8))
    with pytest.raises(ValueError, match="feature_norm.*-1"):
        from_linear(nn.Linear(8, 5), feature_norm=-1.0)
    with pytest.raises(ValueError, match="norm 1.0e-05 drown in the smoothing eps=1e-06.*smaller eps"):
        from_linear(nn.Linear(8, 5), feature_norm=1e-5)
    from_linear(nn.Linear(8, 5), feature_norm=1e-5, faim_cfg=dict(eps=1e-12))
    broken = nn.Linear(8, 5)
    nn.init.constant_(broken.bias, torch.inf)
    with pytest.raises(ValueError, match="weights contain NaN or inf"):
        from_linear(broken)
    with pytest.raises(ValueError, match="4 classes and 8 features .* 5 and 8"):
        agreement(FAIMHead(8, 4), nn.Linear(8, 5), torch.ones(3, 8))


# Models


def trained(arch, num_classes, **kwargs):
    """timm's model with classifiers of trained scale for the features that it makes: logits with a spread of 2."""
    model = timm.create_model(arch, num_classes=num_classes, **kwargs).eval()
    layers = classifier_layers(model)
    features = _classifier_inputs(model, layers, [images(model)])
    with torch.no_grad():
        for name, linear in layers.items():
            linear.weight.normal_(std=2.0 / features[name].norm(dim=1).mean().item())
            linear.bias.normal_(std=0.1)
    return model


def images(model, n=3):
    return torch.randn(n, *resolve_model_data_config(model)["input_size"])


MODELS = ["test_vit", "test_resnet", "deit_tiny_distilled_patch16_224", "crossvit_tiny_240", "dla46x_c", "levit_128s"]


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_convert_save_and_reopen(arch, calibrated, tmp_path, caplog):
    model = trained(arch, 20)
    x = images(model)
    expected = model(x).log_softmax(-1)
    parameters = model.get_parameter(next(n for n, _ in model.named_parameters()))
    caplog.set_level(logging.INFO, "timm_faim")
    model.train()
    assert convert_(model, [x, (x, torch.zeros(3))] if calibrated else None) is model
    assert model.training and all(module.training for module in model.modules())
    model.eval()
    (record,) = caplog.records
    text = record.getMessage()
    heads = faim_heads(model)
    assert text.startswith(f"faim_{arch}: ") and text.count("% of top-1") == len(heads)
    assert ("made-up" in text) != calibrated and ("calibration" in text) == calibrated
    assert all(f"'{name}' agrees in" in text for name in heads)

    assert (model(x).log_softmax(-1) - expected).abs().max() < 0.1
    assert model.get_parameter(next(n for n, _ in model.named_parameters())) is parameters
    assert model.faim_cfg["lambda_init"] == 0.0 and not model.faim_cfg["prior"]
    assert model.faim_cfg["scale_init"] == next(iter(heads.values())).scale_init
    save_for_hf(model, tmp_path, safe_serialization=True)
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(opened) is type(model) and opened.faim_cfg == model.faim_cfg
    assert opened.pretrained_cfg["architecture"] == f"faim_{arch}"
    assert torch.equal(opened(x), model(x))
    opened.reset_classifier(3)
    assert opened(x).shape == (3, 3) and faim_heads(opened)


def test_a_prior_in_one_head_is_a_prior_in_all(tmp_path):
    model = trained("crossvit_tiny_240", 150)  # branches of 96 and 192 features
    x = images(model)
    expected = model(x)
    convert_(model)
    assert model.faim_cfg["prior"] and all(head.prior is not None for head in faim_heads(model).values())
    assert (model(x).log_softmax(-1) - expected.log_softmax(-1)).abs().max() < 0.5
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


def test_one_tensor_of_images_is_one_batch():
    model = trained("test_vit", 5)
    x = images(model)
    heads = [convert_(copy.deepcopy(model), batches).head for batches in (x, [x])]
    assert all(torch.equal(heads[0].state_dict()[name], heads[1].state_dict()[name]) for name in ("mu", "scale"))


def test_options_reach_the_converted_heads():
    model = convert_(trained("test_resnet", 5), faim_cfg=dict(margin=0.2, full_sigma=True))
    assert model.fc.margin == 0.2 and model.fc.metric.full_sigma and model.faim_cfg["margin"] == 0.2


def test_a_head_that_evaluation_does_not_reach_is_converted_from_its_weights(caplog):
    model = trained("test_vit", 5)
    model.extra = nn.Linear(64, 5)
    model.pretrained_cfg["classifier"] = ("head", "extra")
    convert_(model, [images(model)])
    assert "'extra' is not reached" in caplog.text and set(faim_heads(model)) == {"head", "extra"}


def test_models_that_cannot_be_converted():
    with pytest.raises(ValueError, match="Linear is no classification model of timm's.*from_linear"):
        convert_(nn.Linear(8, 5))
    with pytest.raises(ValueError, match="faim_test_vit has FAIM heads already: head"):
        convert_(timm.create_model("faim_test_vit", num_classes=5))
    with pytest.raises(ValueError, match="test_vit has no classifier.*classes"):
        convert_(timm.create_model("test_vit", num_classes=0))
    with pytest.raises(ValueError, match="batches hold no images"):
        convert_(trained("test_vit", 5), [])
    with pytest.raises(ValueError, match="'full_sgima'.*'full_sigma'"):
        convert_(trained("test_vit", 5), faim_cfg=dict(full_sgima=True))
    broken = trained("test_vit", 5)
    nn.init.constant_(broken.head.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        convert_(broken)
    assert isinstance(broken.head, nn.Linear) and not hasattr(broken, "faim_cfg")


# pretrained=True


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet", "deit_tiny_distilled_patch16_224", "dla46x_c"])
@pytest.mark.parametrize("given", [False, True])
def test_pretrained_with_the_weights_own_classes_converts(arch, given, tmp_path, caplog):
    base = trained(arch, 12)
    torch.save(base.state_dict(), tmp_path / "weights.pth")
    cfg = {**base.pretrained_cfg, "file": str(tmp_path / "weights.pth"), "num_classes": 12, "hf_hub_id": None}
    caplog.set_level(logging.INFO, "timm_faim")
    kwargs = dict(num_classes=12) if given else {}
    model = timm.create_model(f"faim_{arch}", pretrained=True, pretrained_cfg=cfg, **kwargs).eval()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"faim_{arch}: linear classifier converted in closed form")
    x = images(model)
    assert (model(x).log_softmax(-1) - base(x).log_softmax(-1)).abs().max() < 0.1
    assert model.num_classes == 12 and model.faim_cfg["lambda_init"] == 0.0
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    opened = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(opened(x), model(x))


def test_pretrained_embeddings_are_no_classes(caplog):
    caplog.set_level(logging.INFO, "timm_faim")
    state_dict = trained("test_vit", 512).state_dict()
    for kwargs in ({}, dict(num_classes=512)):
        overlay = dict(state_dict=state_dict, num_classes=512, tag="clip")
        model = timm.create_model("faim_test_vit", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        assert model.faim_cfg["preset"] == "indicatrix" and model.head.space == "indicatrix"
        assert caplog.text.count("head starts fresh: the weights have no classes") == 1
        caplog.clear()


def test_pretrained_features_only_has_no_head():
    base = trained("test_resnet", 12)
    overlay = dict(state_dict=base.state_dict(), num_classes=12)
    kwargs = dict(pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    assert not faim_heads(timm.create_model("faim_test_resnet", **kwargs))
