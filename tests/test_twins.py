"""faim_ twins in timm's registry: what people do with a timm model still works."""

import copy
import json
import logging
import pickle

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, is_model, is_model_in_modules, model_entrypoint, save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn

import timm_faim
from timm_faim import FAIMHead, faim_heads, fit_
from timm_faim.models import attach_heads, has_classifier
from timm_faim.models.config import block_options, resolve_faim_cfg

CFG = {"full_sigma": False, "lambda_init": 0.1, "margin": 0.3}


def images(model, n=2):
    return torch.randn(n, *resolve_model_data_config(model)["input_size"])


def base_names():
    return [name for name in timm.list_models() if not name.startswith("faim_")]


def test_every_architecture_with_a_classifier_has_a_twin():
    refused = [name for name in base_names() if not has_classifier(name)]
    assert {f"faim_{name}" for name in base_names()} - {f"faim_{name}" for name in refused} == set(
        timm.list_models("faim_*")
    )
    for name in refused:
        with torch.device("meta"):
            assert not hasattr(timm.create_model(name), "reset_classifier"), name
    assert "faim" in timm.list_modules()
    assert is_model("faim_resnet50") and is_model_in_modules("faim_resnet50", "faim")
    assert model_entrypoint("faim_resnet50").__name__ == "faim_resnet50"


def test_every_pretrained_tag_resolves_under_its_faim_name():
    tags = [tag for tag in timm.list_pretrained() if not tag.startswith("faim_") and has_classifier(tag.split(".")[0])]
    assert {f"faim_{tag}" for tag in tags} == set(timm.list_pretrained("faim_*"))
    for tag in tags:
        base, twin = get_pretrained_cfg(tag).to_dict(), get_pretrained_cfg(f"faim_{tag}").to_dict()
        assert twin.pop("architecture") == f"faim_{base.pop('architecture')}"
        assert twin == base, tag
    for arch in base_names():
        if has_classifier(arch) and get_pretrained_cfg(arch) is not None:
            assert get_pretrained_cfg(f"faim_{arch}").tag == get_pretrained_cfg(arch).tag


def test_create_reset_and_read_the_head():
    model = timm.create_model("faim_test_vit", num_classes=7, faim_cfg=CFG).eval()
    assert isinstance(model, timm.models.VisionTransformer)
    assert model.get_classifier() is model.head and isinstance(model.head, FAIMHead)
    assert model.pretrained_cfg["architecture"] == "faim_test_vit"
    x = images(model)
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.head(pre_logits), model(x))
    model.reset_classifier(3)
    assert model.num_classes == 3 and model(x).shape == (2, 3)
    assert not model.head.full_sigma and model.head.space == "indicatrix" and model.head.margin == 0.3
    model.reset_classifier(0)
    assert isinstance(model.head, nn.Identity) and model(x).shape == pre_logits.shape
    model.reset_classifier(4)
    assert isinstance(model.head, FAIMHead) and model(x).shape == (2, 4)
    with pytest.raises(ValueError, match="-2"):
        model.reset_classifier(-2)


def test_new_classes_keep_the_centre_and_the_metric_of_the_features():
    model = timm.create_model("faim_test_vit", num_classes=7)
    x = torch.randn(40, 64) @ torch.randn(64, 64) + 1.0
    fit_(model.head, [(x, torch.arange(40) % 7)])
    wanted, points, prototypes = model.head.sigma(), model.head.embed(x), model.head.mu
    model.reset_classifier(3)
    assert torch.equal(model.head.sigma(), wanted) and torch.equal(model.head.embed(x), points)
    assert model.head.mu.shape == (3, 64) and not torch.equal(model.head.mu, prototypes[:3])


def test_creation_arguments_of_timm():
    assert faim_heads(timm.create_model("faim_test_resnet", num_classes=0)) == {}
    model = timm.create_model("faim_test_vit", num_classes=5, global_pool="avg", drop_rate=0.3, img_size=64)
    assert model.head.in_features == 64 and model.head_drop.p == 0.3
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    features = timm.create_model("faim_test_resnet", features_only=True, out_indices=(1, 2))
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == features.feature_info.channels()
    model = timm.create_model("faim_test_resnet", num_classes=5, in_chans=1)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 5)


def test_grad_checkpointing_and_parameter_groups():
    model = timm.create_model("faim_test_vit", num_classes=5, faim_cfg=dict(preset="flat", prior=True))
    model.set_grad_checkpointing()
    model(images(model)).sum().backward()
    assert model.head.mu.grad.abs().sum() > 0
    head = {f"head.{name}" for name, _ in model.head.named_parameters()}
    assert head == {
        "head.mu", "head.scale", "head.prior", "head.metric.beta", "head.metric.lmbda", "head.metric.log_sigma_diag"
    }  # fmt: skip
    assert head <= model.no_weight_decay()
    by_id = {id(p): name for name, p in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = by_id[id(parameter)]
            scales[name] = group["lr_scale"]
            assert name not in head or group["weight_decay"] == 0
    assert all(scales[name] == 1.0 for name in head)
    assert scales["blocks.0.attn.qkv.weight"] < scales["blocks.5.attn.qkv.weight"] < 1


def test_ema_pickle_and_deepcopy_keep_the_head():
    model = timm.create_model("faim_test_vit", num_classes=5).eval()
    x = images(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module.eval()):
        assert type(other) is type(model)
        assert torch.equal(other(x), expected)
        other.reset_classifier(2)
        assert isinstance(other.head, FAIMHead)
    assert model.head.num_classes == 5
    ema = ModelEmaV3(model, decay=0.0)
    with torch.no_grad():
        model.head.mu.add_(1.0)
    ema.update(model)
    assert torch.allclose(ema.module.head.mu, model.head.mu)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("arch", ["test_vit", "test_resnet", "fastvit_t8"])
def test_scripted_compiled_and_exported_models(arch):
    model = timm.create_model(f"faim_{arch}", num_classes=5, scriptable=True, img_size=None).eval()
    x = images(model)
    expected = model(x)
    assert torch.allclose(torch.jit.script(model)(x), expected, atol=1e-4)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), expected, atol=1e-4)
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), expected, atol=1e-4)


@pytest.mark.parametrize("arch", ["levit_128s", "repvit_m0_9", "efficientvit_m0", "shvit_s1"])
def test_reparameterize_keeps_the_heads(arch):
    model = timm.create_model(f"faim_{arch}", num_classes=5).eval()
    x = images(model)
    heads = len(faim_heads(model))
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(model)
        assert len(faim_heads(fused)) == heads
        assert torch.allclose(fused(x), expected, atol=1e-4 * expected.abs().max())
    assert pickle.loads(pickle.dumps(fused))(x).shape == (2, 5)


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
def test_save_and_open_locally(arch, tmp_path, caplog):
    model = timm.create_model(f"faim_{arch}", num_classes=5, faim_cfg=CFG).eval()
    with torch.no_grad():
        model.get_classifier().scale.fill_(7.0)
    x = images(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == f"faim_{arch}"
    assert config["model_args"]["faim_cfg"] == resolve_faim_cfg(CFG)

    source = f"local-dir:{tmp_path}"
    opened = timm.create_model(source, pretrained=True).eval()
    assert torch.equal(opened(x), model(x))
    assert opened.pretrained_cfg["num_classes"] == 5
    backbone = timm.create_model(source, pretrained=True, num_classes=0).eval()
    assert torch.equal(backbone(x), model.forward_head(model.forward_features(x), pre_logits=True))
    caplog.set_level(logging.INFO, "timm_faim")
    other = timm.create_model(source, pretrained=True, num_classes=9).eval()
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    assert other(x).shape == (2, 9) and "starts fresh" in caplog.text
    features = timm.create_model(source, pretrained=True, features_only=True).eval()
    plain = timm.create_model(source, features_only=True).eval()
    assert not torch.equal(features(x)[-1], plain(x)[-1])

    with pytest.raises(RuntimeError, match="(?s)faim_cfg.*whiten"):
        timm.create_model(source, pretrained=True, faim_cfg=dict(full_sigma=True))
    path = tmp_path / "model.safetensors"
    reloaded = timm.create_model(f"faim_{arch}", num_classes=5, faim_cfg=CFG, checkpoint_path=path).eval()
    assert torch.equal(reloaded(x), model(x))


def test_a_checkpoint_without_part_of_the_backbone_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = timm.create_model("faim_test_resnet", num_classes=5)
    save_for_hf(model, tmp_path, safe_serialization=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layer1.0.conv1.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="layer1.0.conv1.weight"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("founding_names", [False, True])
def test_faim_weights_in_other_files_load_with_their_head(wrapped, founding_names, tmp_path):
    model = timm.create_model("faim_test_resnet", num_classes=5).eval()
    weights = model.state_dict()
    if founding_names:
        weights = {key.replace("fc.metric.", "fc."): value for key, value in weights.items()}
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    opened = timm.create_model("faim_test_resnet", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    x = images(model)
    assert torch.equal(opened.eval()(x), model(x))


@pytest.mark.parametrize("num_classes", [5, 9])
def test_weights_of_another_architecture_are_refused(num_classes):
    overlay = {"state_dict": timm.create_model("faim_test_vit", num_classes=5).state_dict(), "num_classes": 5}
    with pytest.raises(RuntimeError, match="lacks .* backbone tensors .*conv1"):
        timm.create_model("faim_test_resnet", pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay)


def test_attach_heads_twice_changes_nothing():
    model = timm.create_model("faim_test_resnet", num_classes=5, faim_cfg=CFG)
    head, cls = model.fc, type(model)
    attach_heads(model, model.faim_cfg)
    assert model.fc is head and type(model) is cls


def test_pretrained_backbone_loads_and_the_head_starts_fresh_for_other_classes(caplog):
    base = timm.create_model("test_vit", num_classes=1000)
    caplog.set_level(logging.INFO, "timm_faim")
    overlay = {"state_dict": base.state_dict(), "num_classes": 1000}
    model = timm.create_model("faim_test_vit", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.blocks[0].attn.qkv.weight, base.blocks[0].attn.qkv.weight)
    assert model.head.num_classes == 5 and model.faim_cfg == resolve_faim_cfg(None)
    (record,) = caplog.records
    assert "head starts fresh: the weights have 1000 classes, the model 5" in record.getMessage()


def test_models_without_classes_say_so(caplog):
    model = timm.create_model("faim_vit_tiny_patch16_224", pretrained_cfg=dict(num_classes=0, tag="embedding"))
    assert not faim_heads(model) and "pass num_classes" in caplog.text
    caplog.clear()
    with torch.device("meta"):
        timm.create_model("faim_vit_medium_patch16_clip_224")
    assert "embed" in caplog.text
    caplog.clear()
    with torch.device("meta"):
        timm.create_model("faim_vit_medium_patch16_clip_224", num_classes=5)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ({"full_sgima": True}, ValueError, "'full_sgima'.*'full_sigma'"),
        ({"in_features": 3}, ValueError, "in_features"),
        ({"margin": "0.2"}, TypeError, "margin.*float.*'0.2'"),
        ({"full_sigma": 1}, TypeError, "full_sigma.*bool.*1"),
        ({"lambda_init": -1}, ValueError, "lambda_init.*-1"),
        (["full_sigma"], TypeError, "dict"),
    ],
)
def test_bad_faim_cfg(cfg, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("faim_test_resnet", num_classes=5, faim_cfg=cfg)


def test_bad_num_classes():
    with pytest.raises(ValueError, match="-3"):
        timm.create_model("faim_test_resnet", num_classes=-3)


def test_public_names_exist():
    for name in timm_faim.__all__:
        assert hasattr(timm_faim, name)


def test_presets_are_overridden_by_other_keys():
    default = resolve_faim_cfg({})
    assert default["preset"] == "indicatrix" and default["space"] == "indicatrix" and not default["learn_metric"]
    assert resolve_faim_cfg(default) == default
    assert resolve_faim_cfg(dict(margin=0.5))["margin"] == 0.5
    founding = resolve_faim_cfg(dict(preset="founding"))
    assert founding["init"] == "seed" and founding["space"] == "flat" and founding["lambda_init"] == 0.1
    for key, now in (("recipe", "preset"), ("normalize", "space"), ("full_sigm", "full_sigma")):
        with pytest.raises(ValueError, match=f"unknown faim_cfg key '{key}'; did you mean '{now}'"):
            resolve_faim_cfg({key: "plain"})
    with pytest.raises(ValueError, match="preset'\\] must be one of indicatrix, flat, founding, got 'best'"):
        resolve_faim_cfg(dict(preset="best"))


def test_the_head_alone_is_the_head_of_a_model():
    alone = FAIMHead(64, 5)
    model = timm.create_model("faim_test_vit", num_classes=5)
    assert repr(alone) == repr(model.head)
    model.reset_classifier(5)
    assert repr(alone) == repr(model.head)


EARLIER = {"recipe": "plain", "lambda_init": 0.1, "scale_init": 10.0, "full_sigma": False, "symmetric": True,
           "init": "scaled", "normalize": False, "learn_scale": True, "damping": 0.0, "prior": False, "margin": 0.0,
           "indicatrix": False, "learn_metric": True, "eps": 1e-6, **block_options()}  # fmt: skip


@pytest.mark.parametrize(("saved", "now"), [
    ({}, {"preset": "flat"}),
    ({"init": "seed", "recipe": "seed"}, {"preset": "founding"}),
    ({"normalize": True, "indicatrix": True, "recipe": "indicatrix", "learn_metric": False, "full_sigma": True,
      "lambda_init": 0.0, "scale_init": 16.0, "margin": 0.2}, {}),
    ({"normalize": True}, {"preset": "flat", "space": "sphere"}),
])  # fmt: skip
@pytest.mark.parametrize("without", [(), ("recipe", "indicatrix", "learn_metric")])
def test_configs_saved_before_there_were_spaces(saved, now, without):
    config = {key: value for key, value in (EARLIER | saved).items() if key not in without}
    if without and saved.get("recipe") == "indicatrix":
        return  # it is as old as these keys
    resolved, wanted = resolve_faim_cfg(config), resolve_faim_cfg(now)
    if without:
        wanted["preset"] = resolved["preset"]
    assert resolved == wanted


def test_a_saved_head_of_the_flat_form_stays_what_it_was(tmp_path):
    model = timm.create_model("faim_test_vit", num_classes=3, faim_cfg=dict(preset="flat")).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["faim_cfg"] = EARLIER
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(model)
    assert torch.equal(again(x), model(x)) and again.faim_cfg == model.faim_cfg
    assert all(p.requires_grad for p in again.head.metric.parameters())
