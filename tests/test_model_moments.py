"""Second moments inside timm models: the branch, its hooks, and what creation, saving and fitting make of them."""

import copy
import json
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.utils import reparameterize_model
from torch.nn import functional as F

from timm_faim import FAIMHead, convert_, faim_heads, fit_, save_model

C = 3
SIZES = {"swin_tiny_patch4_window7_224": 64, "deit_tiny_distilled_patch16_224": 64}
ARCHS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout", "mobilenetv3_small_050",
         "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"]  # fmt: skip
SMALL = {"components": 8, "rank": 4}


def make(arch="test_resnet", moments=SMALL, num_classes=C, **arguments):
    if arch in SIZES:
        arguments.setdefault("img_size", SIZES[arch])
    cfg = {"moments": moments, **arguments.pop("faim_cfg", {})}
    return timm.create_model(f"faim_{arch}", num_classes=num_classes, faim_cfg=cfg, **arguments).eval()


def images(count=2, size=64, channels=3):
    return torch.randn(count, channels, size, size)


def labelled(count=24, classes=C):
    """Classes that differ in colour and in grain, in two batches."""
    targets = torch.arange(count) % classes
    x = images(count) + targets[:, None, None, None] * torch.tensor([0.5, -0.5, 0.2])[:, None, None]
    x = x + F.avg_pool2d(x, 5, 1, 2) * targets[:, None, None, None]
    return list(zip(x.split(17), targets.split(17), strict=True))


def outputs(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_with_moments_is_timms_and_has_them_beside_its_features(arch):
    model, x = make(arch), images()
    plain, twin = timm.create_model(arch, num_classes=C, **model_arguments(arch)).eval(), model.state_dict()
    plain.load_state_dict({key: twin.get(key, value) for key, value in plain.state_dict().items()})
    assert model.num_features == plain.num_features and isinstance(model, type(plain))
    features = outputs(plain.forward_features, x)
    seen = []
    for head in faim_heads(model).values():
        head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    logits = outputs(model, x)
    assert torch.equal(outputs(model.forward_features, x), features)
    assert torch.equal(outputs(model.forward_head, features), logits)
    pre_logits = outputs(lambda f: plain.forward_head(f, pre_logits=True), features)
    outputs(model.forward_features, x)
    assert torch.equal(outputs(lambda f: model.forward_head(f, pre_logits=True), features), pre_logits)
    width = pre_logits.shape[1]
    (stage,), (moments,) = model.faim_moments.stages, model.faim_moments
    maps = outputs(lambda x: output_of(plain, stage, x), x)
    for joined in seen:
        joined = joined.flatten(1)
        assert joined.shape == (2, width + 45) and faim_heads(model)
        assert torch.equal(joined[:, width:], outputs(moments, maps))
    assert all(head.parts == [width, 45] for head in faim_heads(model).values())


def model_arguments(arch):
    return {"img_size": SIZES[arch]} if arch in SIZES else {}


def output_of(model, stage, x):
    """What the stage gives in a pass of a model."""
    seen = []
    handle = model.get_submodule(stage.name).register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(x)
    handle.remove()
    (output,) = seen
    return output if stage.item < 0 else output[stage.item]


def test_an_image_has_the_moments_of_its_own_map():
    model, x = make("test_vit"), images()
    assert torch.equal(outputs(model, x), outputs(model, x))
    other = outputs(model, torch.cat([x[:1], images(1)]))
    assert torch.allclose(other[0], outputs(model, x)[0], atol=1e-4) and not torch.allclose(
        other[1], outputs(model, x)[1]
    )


NEEDS = (
    "the head needs the maps of {} beside the pooled features; call the whole model, or forward_features just before"
)


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "mobilenetv3_small_050"])
def test_a_head_without_the_maps_of_its_pass_is_an_error(arch):
    model, x = make(arch), images()
    needs = re.escape(NEEDS.format(model.faim_moments.stages[0].name))
    features = model.forward_features(x)
    model.forward_head(features)
    with pytest.raises(ValueError, match=needs):
        model.forward_head(features)
    model(x)
    pooled = torch.randn(2, model.get_classifier().parts[0])
    with pytest.raises(ValueError, match=needs):
        model.get_classifier()(pooled)
    model.forward_features(images(5))
    with pytest.raises(ValueError, match="features of 2 images and maps of 5; call the whole model"):
        model.forward_head(features)
    whole = torch.randn(2, model.get_classifier().in_features)
    assert model.get_classifier()(whole).shape == (2, C)  # features of the whole width need no maps


def test_features_only_and_no_classes_are_timms():
    features = timm.create_model("faim_test_resnet", features_only=True, faim_cfg={"moments": True})
    plain = timm.create_model("test_resnet", features_only=True)
    assert features.feature_info.channels() == plain.feature_info.channels()
    assert features.state_dict().keys() == plain.state_dict().keys()
    model = make(num_classes=0)
    assert not faim_heads(model) and outputs(model, images()).shape == (2, model.num_features)
    assert not model.faim_moments._maps  # nothing reads them, nothing is kept


@pytest.mark.parametrize("arch", ["test_vit", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"])
def test_new_classes_keep_projection_centre_metric_and_weights(arch):
    model = fit_(make(arch, SMALL | {"weight": 0.6}), labelled())
    kept = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith((".mu", ".scale"))}
    assert model.faim_moments[0].is_fitted and any(k.endswith("frames.0.stretch") and v.any() for k, v in kept.items())
    model.reset_classifier(5)
    assert outputs(model, images()).shape == (2, 5)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in kept.items())
    assert model.get_submodule(next(iter(faim_heads(model)))).part_weights.tolist() == pytest.approx([0.4, 0.6])
    model.reset_classifier(0)
    assert outputs(model, images()).shape == (2, model.num_features if arch == "test_vit" else model.head_hidden_size)
    model.reset_classifier(4)
    assert outputs(model, images()).shape == (2, 4)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in kept.items() if k.startswith("faim_moments"))
    head = next(iter(faim_heads(model).values()))
    assert head.parts[1] == 45 and not head.frames[0].stretch.any()


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224"])
def test_copies_are_whole_and_apart(arch):
    model, x = make(arch), images()
    expected = outputs(model, x)
    model.forward_features(x.requires_grad_())  # leaves maps behind, part of a graph
    x = x.detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.faim_moments._maps and type(other) is type(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        assert torch.equal(outputs(other, x), expected)  # its heads read its own branch, and that its own stages
        with torch.no_grad():
            for p in model.parameters():
                p.div_(1.5)


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("moments", [True, {"components": 8, "weight": 0.5, "rank": 4}], ids=["default", "small"])
def test_save_and_open(arch, moments, tmp_path):
    model, x = fit_(make(arch, moments), labelled()), images()
    source = f"local-dir:{save_model(model, tmp_path)}"
    saved = json.loads((tmp_path / "config.json").read_text())["model_args"]["faim_cfg"]["moments"]
    assert saved["stages"] == [model.faim_moments.stages[0].name]
    opened = timm.create_model(source, pretrained=True).eval()
    assert torch.equal(outputs(opened, x), outputs(model, x)) and opened.faim_cfg == model.faim_cfg
    assert outputs(timm.create_model(source).eval(), x).shape == (2, C)
    other = timm.create_model(source, pretrained=True, num_classes=5).eval()
    assert outputs(other, x).shape == (2, 5)
    for (name, head), mine in zip(faim_heads(other).items(), faim_heads(model).values(), strict=True):
        whole = torch.randn(4, head.in_features)
        assert torch.equal(head.embed(whole), mine.embed(whole)), name
    assert torch.equal(other.faim_moments[0].projection, model.faim_moments[0].projection)
    features = timm.create_model(source, pretrained=True, num_classes=0).eval()
    assert torch.equal(outputs(features.forward_features, x), outputs(model.forward_features, x))


def test_a_checkpoint_of_other_moments_is_refused(tmp_path):
    source = f"local-dir:{save_model(make(), tmp_path)}"
    for moments, message in (({"components": 6}, "of other stages than layer3.0, or other numbers of components"),
                             ({"stages": "layer2", "components": 8}, "of other stages than layer2.0"),
                             ({"components": 8, "rank": 5}, r"(?s)does not fit this faim_cfg.*directions"),
                             (["layer2", "layer3"], "of other stages than layer2.0, layer3.0"),
                             (False, "reads second moments; use the checkpoint's own faim_cfg")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            timm.create_model(source, pretrained=True, faim_cfg={"moments": moments})
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "faim_moments" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="lacks their faim_moments; save the whole state dict"):
        timm.create_model(source, pretrained=True)


def test_weights_without_moments_open_with_a_fresh_branch(caplog):
    base = timm.create_model("test_resnet", num_classes=7)
    overlay = {"state_dict": base.state_dict(), "num_classes": 7}
    model = make(pretrained=True, pretrained_cfg_overlay=overlay)
    for name, value in base.state_dict().items():
        assert name.startswith("fc.") or torch.equal(model.state_dict()[name], value), name
    assert not model.faim_moments[0].is_fitted and outputs(model, images()).shape == (2, C)
    with pytest.raises(ValueError, match="moments=.*sees the pooled features alone.*pretrained_head='fresh'"):
        make(num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay)
    model = make(num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay, pretrained_head="fresh")
    assert model.get_classifier().num_classes == 7 and len(model.get_classifier().frames) == 1


@pytest.mark.parametrize(("moments", "error", "message"), [
    ({"stage": "layer3"}, ValueError, "unknown key 'stage' in faim_cfg['moments']; did you mean 'stages'? known keys"),
    ({"wieght": 0.5}, ValueError, "did you mean 'weight'?"),
    ({"components": 193}, ValueError, "components must be at most the 192 channels and 128, got 193"),
    ({"components": 129}, ValueError, "at most the 192 channels and 128, got 129"),
    ({"components": -1}, ValueError, "faim_cfg['moments']: components must be >= 1, got -1"),
    ({"components": 8.0}, TypeError, "components must be a whole number >= 1, got 8.0"),
    ({"components": False}, TypeError, "components must be a whole number >= 1, got False"),
    ({"rank": 0}, ValueError, "faim_cfg['moments']: rank must be >= 1, got 0"),
    ({"weight": 0}, ValueError, "faim_cfg['moments']: weight must be a number in (0, 1], got 0"),
    ({"weight": 1.5}, ValueError, "weight must be a number in (0, 1], got 1.5"),
    ({"weight": "1"}, TypeError, "weight must be a number in (0, 1], got '1'"),
    ({"stages": [3]}, TypeError, "stages must be names of modules, got [3]"),
    ([""], TypeError, "stages must be names of modules, got ['']"),
    (["layer3", "layer3"], ValueError, "a stage is named twice in ['layer3', 'layer3']"),
    ("layer9", ValueError, "moments='layer9' is no module of faim_test_resnet; did you mean 'layer"),
    (3, TypeError, "faim_cfg['moments'] must be True, False, the name of a stage, a list of names or a dict of"),
])  # fmt: skip
def test_bad_options_of_moments(moments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(moments=moments)


@pytest.mark.parametrize("options", [{"space": "sphere"}, {"preset": "flat"}, {"lambda_init": 0.1},
                                     {"learn_metric": True}, {"preset": "founding"}])  # fmt: skip
def test_moments_need_a_head_that_can_have_parts(options):
    with pytest.raises(ValueError, match="need space='indicatrix', lambda_init=0 and learn_metric=False, got"):
        make(faim_cfg=options)


def test_a_linear_classifier_becomes_no_head_with_moments():
    with pytest.raises(ValueError, match="moments=True: a linear classifier sees the pooled features alone"):
        convert_(timm.create_model("test_resnet", num_classes=C), faim_cfg={"moments": True})


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_mambaout", "deit_tiny_distilled_patch16_224"])
def test_fit_sets_projection_and_heads_from_the_same_images(arch):
    model, batches = make(arch), labelled()
    model.train()
    fit_(model, batches)
    assert model.training
    model.eval()
    (stage,), (moments,) = model.faim_moments.stages, model.faim_moments
    maps = torch.cat([outputs(lambda x: output_of(model, stage, x), x) for x, _ in batches])
    outputs(model, batches[0][0])
    alone = copy.deepcopy(moments).fit_([maps])
    torch.testing.assert_close(moments.mean, alone.mean)
    torch.testing.assert_close(moments.offset, alone.offset)
    torch.testing.assert_close((moments.projection.t() @ alone.projection).abs(), torch.eye(8), rtol=1e-3, atol=1e-3)
    x, targets = (torch.cat(each) for each in zip(*batches, strict=True))
    assert (outputs(model, x).argmax(1) == targets).float().mean() > 0.9
    for head in faim_heads(model).values():
        lengths = torch.stack([part.norm(dim=1) for part in head.mu.split(head.parts, 1)])
        torch.testing.assert_close(lengths.square(), head.part_weights[:, None].expand(2, C), rtol=1e-4, atol=1e-4)
    before = moments.projection.clone()
    fit_(model, iter(batches))  # a second fit reads once, and keeps the projection
    assert torch.equal(moments.projection, before)


def test_a_fit_refuses_batches_that_can_be_read_once_with_the_mend():
    model, batches = make(), labelled()
    with pytest.raises(ValueError, match=r"give batches that can be read twice \(a DataLoader or a list\)"):
        fit_(model, (batch for batch in batches))
    assert not model.faim_moments[0].is_fitted
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*map(torch.cat, zip(*batches, strict=True))), 9)
    assert fit_(model, loader).faim_moments[0].is_fitted


def test_the_projection_is_of_the_first_images_alone():
    x, targets = images(1100, size=32), torch.arange(1100) % C
    model = make("test_vit", img_size=32)
    other = copy.deepcopy(model)
    fit_(model, list(zip(x.split(100), targets.split(100), strict=True)))
    fit_(other, [(x[:600], targets[:600])])
    torch.testing.assert_close(other.faim_moments[0].mean, model.faim_moments[0].mean)
    assert not torch.allclose(other.head.center, model.head.center, rtol=1e-3, atol=1e-3)  # of all images


def test_fits_of_hard_data():
    model = make("test_vit")
    same = torch.zeros(6, 3, 64, 64)
    with pytest.raises(ValueError, match="all features are equal"):
        fit_(model, [(same, torch.arange(6) % C)])
    with pytest.raises(ValueError, match="NaN or inf"):
        fit_(make("test_vit"), [(same * float("nan"), torch.arange(6) % C)])
    flat = make("test_vit")
    with torch.no_grad():
        flat.pos_embed.zero_()
        flat.cls_token.zero_()
    with pytest.raises(ValueError, match="the maps are constant"):
        fit_(flat, [(same, torch.arange(6) % C)])
    with pytest.raises(ValueError, match="class indices"):
        fit_(make("test_vit"), [(images(6), torch.rand(6, C))])
    with pytest.raises(ValueError, match=r"no (maps|samples)"):
        fit_(make("test_vit"), [])


@pytest.mark.parametrize("count", [C, 2], ids=["one image a class", "fewer images than classes"])
def test_few_images_fit(count, caplog):
    model, x = make("test_resnet"), images(count)
    fit_(model, [(x, torch.arange(count))])
    head = model.get_classifier()
    assert head.frames[0].stretch.any() and head.frames[0].center.any()
    assert torch.equal(outputs(model, x).argmax(1), torch.arange(count))
    assert ("have no samples" in caplog.text) == (count < C)


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "test_mambaout", "deit_tiny_distilled_patch16_224"])
def test_gradients_reach_the_projection_and_are_the_same_checkpointed(arch):
    model, x = fit_(make(arch), labelled()).train(), images(4)
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(0)
        output = model(x)
        output = sum(output) if isinstance(output, tuple) else output
        F.cross_entropy(output, torch.arange(4) % C).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert not model.faim_moments._maps and not model.faim_moments._vectors
    first, second = found
    assert first.keys() == second.keys() and first["faim_moments.0.projection"].any()
    assert not {name for name in first if name.endswith(("moments.0.mean", "moments.0.offset", "center", "stretch"))}
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, msg=name)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_moments_teach_the_stage_and_what_is_below(weight):
    """With all the weight on them, what is above the stage learns nothing."""
    model = fit_(make("test_resnet", SMALL | {"weight": weight}), labelled()).train()
    F.cross_entropy(model(images(4)), torch.arange(4) % C).backward()
    taught = {name: any(p.grad.any() for p in module.parameters()) for name, module in model.named_children()
              if name.startswith("layer")}  # fmt: skip
    assert taught == {"layer1": True, "layer2": True, "layer3": True, "layer4": weight < 1}


def test_distilled_heads_read_the_same_moments():
    model, x = make("deit_tiny_distilled_patch16_224"), images()
    assert len(faim_heads(model)) == model.faim_moments.heads == 2
    seen, calls = [], []
    model.faim_moments[0].register_forward_hook(lambda *_: calls.append(1))
    for head in faim_heads(model).values():
        head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    for _ in range(2):
        outputs(model, x)
    assert len(calls) == 2 and len(seen) == 4  # once a pass
    assert torch.equal(seen[0][:, 192:], seen[1][:, 192:]) and not torch.equal(seen[0][:, :192], seen[1][:, :192])
    model.train()
    model.set_distilled_training(True)
    first, second = model(x)
    assert first.shape == second.shape == (2, C)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
def test_half_precision_is_finite_for_maps_of_any_kind(arch, dtype):
    model = make(arch, img_size=64) if arch == "test_vit" else make(arch)
    model = fit_(model, labelled()).to(dtype)
    for x in (torch.zeros(2, 3, 64, 64), torch.full((2, 3, 64, 64), 2.0), images(), 30.0 * images()):
        x = x.to(dtype).requires_grad_()
        logits = model(x)
        logits.sum().backward()
        assert logits.isfinite().all() and x.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(images()).isfinite().all()


def test_a_map_of_one_position_is_finite():
    model = make(moments="layer4")  # 16 px: 1 × 1
    assert outputs(fit_(model, labelled()), images(2, size=16)).isfinite().all()
    x = images(2, size=16).requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()


def test_several_stages_are_parts_of_their_own():
    model = make(moments={"stages": ["layer2", "layer3"], "components": 6, "weight": 0.6, "rank": 4})
    head, width = model.get_classifier(), model.num_features
    assert [stage.name for stage in model.faim_moments.stages] == ["layer2.0", "layer3.0"]
    assert head.parts == [head.parts[0], 28, 28] and head.in_features == head.parts[0] + 56
    assert head.part_weights.tolist() == pytest.approx([0.4, 0.3, 0.3])
    assert model.num_features == width and model.faim_cfg["moments"]["stages"] == ["layer2.0", "layer3.0"]
    fit_(model, labelled())
    assert all(moments.is_fitted for moments in model.faim_moments) and all(
        frame.stretch.any() for frame in head.frames
    )
    seen, x = [], images()
    head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0].flatten(1)))
    outputs(model, x)
    for i, (stage, part) in enumerate(zip(model.faim_moments.stages, seen[0].split(head.parts, 1)[1:], strict=True)):
        wanted = outputs(lambda x, stage=stage, i=i: model.faim_moments[i](output_of(model, stage, x)), x)
        torch.testing.assert_close(part, wanted)
    with pytest.raises(ValueError, match="needs the maps of layer2.0, layer3.0"):
        model.forward_head(torch.randn(2, model.num_features, 2, 2))


@pytest.mark.parametrize("moments", [True, "layer2", "layer2.0", ["layer2", "layer3"], {"stages": "layer2"}])
def test_ways_to_ask_for_moments(moments):
    model = make(moments=moments)
    names = [stage.name for stage in model.faim_moments.stages]
    wanted = {"layer2", "layer3"} if isinstance(moments, list) else {"layer3"} if moments is True else {"layer2"}
    assert {name.partition(".")[0] for name in names} == wanted
    head, first = model.get_classifier(), model.faim_moments[0]
    assert isinstance(head, FAIMHead) and first.components == min(first.channels, 112)
    assert head.frames[0].rank == 256 and head.part_weights[0].item() == pytest.approx(0.25)
    again = make(moments=model.faim_cfg["moments"])
    assert repr(again.faim_moments) == repr(model.faim_moments) and again.faim_cfg == model.faim_cfg


def test_without_moments_nothing_is_there():
    for moments in (False, None):
        model = make(moments=moments)
        assert not hasattr(model, "faim_moments") and model.faim_cfg["moments"] is False
        assert model.get_classifier().parts == [model.get_classifier().in_features]


@pytest.mark.parametrize("arch", ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224"])
def test_compiled_and_exported_models_are_the_model(arch):
    model, x, more = fit_(make(arch), labelled()), images(), images(5)
    expected, close = outputs(model, x), dict(rtol=1e-4, atol=1e-3)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, x), expected, **close)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}}).module()
    torch.testing.assert_close(exported(x), expected, **close)
    torch.testing.assert_close(exported(more), outputs(model, more), **close)
    assert torch.equal(outputs(model, x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_a_model_with_moments_does_not_script_and_says_what_does():
    with pytest.raises(NotImplementedError, match="does not script.*torch.jit.trace.*torch.export"):
        torch.jit.script(make("test_vit"))


def test_a_classifier_that_is_a_convolution_gets_the_moments_at_every_place():
    model, x = make("resnetv2_50x1_bit"), images()
    expected = outputs(model, x)
    assert expected.shape == (2, C)
    dense = make("resnetv2_50x1_bit", global_pool="")
    dense.load_state_dict(model.state_dict())
    logits = outputs(dense, x)
    assert logits.shape == (2, C, 2, 2)
    seen = []
    dense.get_classifier().register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0]))
    outputs(dense, x)
    (joined,) = seen
    model.get_classifier()(joined.mean((2, 3), keepdim=True))
    torch.testing.assert_close(outputs(model.get_classifier(), joined.mean((2, 3), keepdim=True)).flatten(1), expected)


@pytest.mark.parametrize("arch", ["levit_128s", "shvit_s1"])
def test_reparameterised_models_keep_their_moments(arch):
    model, x = make(arch), images(2, 224)
    expected = outputs(model, x)
    torch.testing.assert_close(outputs(reparameterize_model(model).eval(), x), expected, rtol=1e-4, atol=1e-3)


def test_blocks_and_moments_go_together(tmp_path):
    model, x = make("test_vit", faim_cfg={"blocks": 4}), images()  # the stage is one of the blocks
    with torch.no_grad():
        model.blocks[3].faim_chart.p.add_(0.1)
    assert not torch.equal(outputs(model, x), outputs(make("test_vit"), x))
    opened = timm.create_model(f"local-dir:{save_model(model, tmp_path)}", pretrained=True).eval()
    assert torch.equal(outputs(opened, x), outputs(model, x))
