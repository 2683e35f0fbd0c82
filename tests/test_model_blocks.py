"""FAIM blocks inside timm models: outputs and names of the backbone stay; what timm and PyTorch do with models goes."""

import copy
import json
import pickle

import pytest
import timm
import torch
from accelerate.utils import is_torch_version
from children import in_group
from runs import make_images, read_summary, train, train_tiny
from safetensors.torch import load_file, save_file
from timm.models import group_parameters
from torch import nn

import timm_faim
from timm_faim import FAIMChart
from timm_faim.hub.package import save_model
from timm_faim.models.blocks import block_places
from timm_faim.run.errors import UserError

# transformers [B, N, D], NHWC, NCHW of several kinds
ARCHS = {
    "vit_tiny_patch16_224": 2,
    "swin_tiny_patch4_window7_224": 2,
    "convnext_atto": 2,
    "resnet18": 2,
    "efficientnet_b0": 2,
    "test_vit": 1,
}
SIZES = {"vit_tiny_patch16_224": 224, "swin_tiny_patch4_window7_224": 224, "test_vit": 160}


def create(arch, seed=0, **cfg):
    torch.manual_seed(seed)
    model = timm.create_model(f"faim_{arch}", num_classes=5, faim_cfg=cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gamma"):  # a layer scale near 0 would make a block the identity
                parameter.fill_(0.5)
    return model


def charts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FAIMChart)}


def disturb(model):
    """Charts away from the identity."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for chart in charts_of(model).values():
            for parameter in chart.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def images(arch, count=2):
    size = SIZES.get(arch, 64)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("cfg", [{}, {"block_base": "mean", "block_symmetric": False}, {"block_full_sigma": True}])
def test_the_outputs_of_the_backbone_stay_under_its_own_names(arch, cfg):
    plain, model = create(arch), create(arch, 1, blocks=ARCHS[arch], **cfg)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all(".faim_chart." in name for name in missing)
    assert len(charts_of(model)) == ARCHS[arch]
    x = images(arch)
    with torch.no_grad():
        expected, found = plain.forward_features(x), model.forward_features(x)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert not torch.allclose(disturb(model).forward_features(x), expected, rtol=1e-2)


def test_the_last_blocks_are_taken():
    assert list(charts_of(create("vit_tiny_patch16_224", blocks=2))) == ["blocks.10.faim_chart", "blocks.11.faim_chart"]
    assert list(charts_of(create("resnet18", blocks=2))) == ["layer3.1.faim_chart", "layer4.1.faim_chart"]
    assert [(p.dim, p.channels_first) for p in block_places("swin_tiny_patch4_window7_224", {})[-1:]] == [(768, False)]
    assert [(p.dim, p.channels_first) for p in block_places("resnet50", {})[-1:]] == [(2048, True)]


@pytest.mark.parametrize(
    "arch, arguments",
    [
        ("vit_tiny_patch16_224", dict(img_size=96, in_chans=1)),
        ("convnext_atto", dict(in_chans=4)),
        ("resnet18", dict(in_chans=1)),
    ],
)
def test_with_other_arguments(arch, arguments):
    model = timm.create_model(f"faim_{arch}", num_classes=3, faim_cfg=dict(blocks=1), **arguments)
    size = arguments.get("img_size", 64)
    assert model(torch.randn(2, arguments["in_chans"], size, size)).shape == (2, 3)


@pytest.mark.parametrize(
    "arch, count, message",
    [
        ("vgg11", 1, "faim_vgg11 has none. Ask for blocks=0"),
        ("densenet121", 2, "faim_densenet121 has none"),
        ("resnet18", 6, r"faim_resnet18 has 5: layer1.0, layer1.1, layer2.1, layer3.1, layer4.1. Ask for no more"),
    ],
)
def test_more_blocks_than_there_are(arch, count, message):
    with pytest.raises(ValueError, match=message):
        create(arch, blocks=count)


@pytest.mark.parametrize(
    "cfg, error, message",
    [
        (dict(blocks=-1), ValueError, r"faim_cfg\['blocks'\] must be >= 0, got -1"),
        (dict(blocks=1, block_base="man"), ValueError, "must be one of .* got 'man'"),
        (dict(blocks=1.5), TypeError, "must be int"),
        (dict(block=1), ValueError, "did you mean 'blocks'"),
        (dict(blocks=2, block_shared=True), ValueError, "have different widths"),
    ],
)
def test_wrong_options(cfg, error, message):
    with pytest.raises(error, match=message):
        create("resnet18", **cfg)


def test_conversion_after_the_fact_takes_no_blocks():
    with pytest.raises(ValueError, match="blocks=1: blocks are put in when a model is created"):
        timm_faim.convert_(timm.create_model("test_vit"), faim_cfg=dict(blocks=1))


def test_pretrained_weights_keep_their_classes(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", num_classes=7).eval()
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    overlay = dict(file=str(tmp_path / "w.safetensors"), num_classes=7)
    model = timm.create_model(
        "faim_test_vit", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, faim_cfg=dict(blocks=1)
    ).eval()
    x = images("test_vit", 8)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), plain.forward_features(x))
        assert torch.equal(model(x).argmax(1), plain(x).argmax(1))
    assert len(charts_of(model)) == 1
    save_model(model, tmp_path / "saved")
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()(x), model(x))


def test_a_backbone_without_classes_comes_back(tmp_path):
    model = disturb(timm.create_model("faim_test_vit", num_classes=0, faim_cfg=dict(blocks=1)).eval())
    save_model(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images("test_vit")), model(images("test_vit")))


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
def test_fewer_stages_leave_their_charts_out(tmp_path, arch):
    model = disturb(create(arch, blocks=1))
    save_model(model, tmp_path)
    x = images(arch)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(0, 1))
    features.eval()
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(features(x), expected, strict=True))


@pytest.mark.parametrize(
    "cfg", [dict(blocks=2), dict(blocks=2, block_base="mlp", block_shared=True), dict(blocks=1, block_full_sigma=True)]
)
def test_a_saved_model_comes_back(tmp_path, cfg):
    model = disturb(create("vit_tiny_patch16_224", **cfg))
    save_model(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images("vit_tiny_patch16_224")
    assert torch.equal(again(x), model(x)) and again.faim_cfg == model.faim_cfg
    with pytest.raises(RuntimeError, match=r"FAIM blocks at blocks.1\d.*use the checkpoint's own faim_cfg"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, faim_cfg=dict(blocks=3))
    with pytest.raises(RuntimeError, match="FAIM blocks"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, faim_cfg={})
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    expected = model.forward_intermediates(x, indices=3, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(x)[-3:], expected, strict=True))


def test_a_convolutional_feature_extractor_has_the_charts(tmp_path):
    model = disturb(create("resnet18", blocks=2))
    save_model(model, tmp_path)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    x = images("resnet18")
    assert torch.equal(features(x)[-1], model.forward_features(x))
    convnext = disturb(create("convnext_atto", blocks=2))
    save_model(convnext, tmp_path / "b")
    features = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True, features_only=True).eval()
    assert len(charts_of(features)) == 2
    expected = convnext.forward_intermediates(x, intermediates_only=True)[-1]
    assert torch.allclose(features(x)[-1], expected, atol=1e-6)


def test_a_checkpoint_without_blocks_starts_them_as_the_identity(tmp_path, caplog):
    caplog.set_level("INFO")
    model = create("test_vit")
    save_model(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, faim_cfg=dict(blocks=1)).eval()
    assert torch.equal(again(images("test_vit")), model(images("test_vit")))
    assert "start as the identity" in caplog.text


def test_copies_and_pickles():
    model = disturb(create("test_vit", blocks=1))
    x = images("test_vit")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x)) and type(copied.blocks[-1]) is type(model.blocks[-1])
        assert isinstance(copied.blocks[-1], type(timm.create_model("test_vit").blocks[-1]))


def test_another_number_of_classes_keeps_the_charts():
    model = disturb(create("test_vit", blocks=1))
    before = {name: value.clone() for name, value in model.state_dict().items() if "chart" in name}
    model.reset_classifier(9)
    assert model(images("test_vit")).shape == (2, 9)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("arch", ["test_vit", "convnext_atto"])
def test_checkpointing_gives_the_same_gradients(arch):
    model = disturb(create(arch, blocks=1)).train()
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(images(arch)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_groups_and_decay():
    model = create("vit_tiny_patch16_224", blocks=2, block_full_sigma=True, block_base="mlp")
    for names in group_parameters(model, model.group_matcher()).values():
        of_last = any(name.startswith("blocks.11.attn") for name in names)
        assert any(name.startswith("blocks.11.faim_chart") for name in names) == of_last
    charts = {name for name, _ in model.named_parameters() if ".faim_chart." in name}
    assert charts <= model.no_weight_decay()


@pytest.mark.parametrize("arch", ["test_vit", "resnet18"])
def test_compiled_and_exported(arch):
    model = disturb(create(arch, blocks=1, block_base="mean"))
    x = images(arch)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, atol=1e-4)
        exported = torch.export.export(model, (x,))
        assert torch.allclose(exported.module()(x), expected, atol=1e-4)


def gradients_are_those_of_one_process(sharded):
    torch.manual_seed(0)
    assert torch.distributed.get_world_size() == 2
    whole = disturb(create("test_vit", blocks=1, block_base="mean", block_full_sigma=True)).train()
    parallel = copy.deepcopy(whole)
    x, rank = images("test_vit", 4), torch.distributed.get_rank()
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in parallel.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(parallel, mesh=mesh)
        run = parallel
    else:
        run = nn.parallel.DistributedDataParallel(parallel)
    whole(x).square().mean().backward()
    run(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for (name, a), b in zip(whole.named_parameters(), parallel.parameters(), strict=True):
        if not a.requires_grad:
            continue
        found = b.grad.full_tensor() if sharded else b.grad
        assert (found - a.grad).abs().max() <= 1e-4 * a.grad.abs().max() + 1e-7, name


@pytest.mark.parametrize(
    "sharded",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                is_torch_version("<", "2.7"), reason="FSDP2 of torch 2.6 has no streams on the CPU"
            ),
        ),
    ],
)
def test_two_processes_compute_the_gradients_of_one(sharded):
    in_group(gradients_are_those_of_one_process, sharded)


def test_training_moves_the_charts_and_saves_them(tmp_path):
    data = make_images(tmp_path / "images")
    run = train_tiny(
        data,
        tmp_path,
        "--faim-blocks",
        "1",
        "--contrastive",
        "supcon:0.1",
        "--views",
        "2",
        "--lr-scale-mu",
        "2",
        "--epochs",
        "3",
        "--model-ema",
    )
    saved = load_file(run / "last.safetensors")
    start = FAIMChart(32).state_dict()
    for name in ("p", "owned_metric.lmbda", "owned_metric.log_sigma_diag"):
        (key,) = [key for key in saved if key.endswith(f"faim_chart.{name}")]
        assert not torch.equal(saved[key], start[name]), name
    assert "train_lr_sigma" in read_summary(run)[0]
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert len(charts_of(model)) == 1 and model.faim_cfg["blocks"] == 1


def test_evaluation_alone_is_that_of_the_run(tmp_path):
    data = make_images(tmp_path / "images")
    run = train_tiny(data, tmp_path, "--faim-blocks", "1", "--faim-cfg", "space=sphere", "scale_init=16.0")
    train("--eval-only", "--resume", run, "--output", tmp_path, "--experiment", "again", "--workers", "0")
    best = max(read_summary(run), key=lambda row: float(row["eval_top1"]))
    found = json.loads((tmp_path / "again" / "eval.json").read_text())["metrics"]
    assert found["loss"] == pytest.approx(float(best["eval_loss"]), rel=1e-5)


def test_blocks_for_a_saved_model_need_all_its_options(tmp_path):
    data = make_images(tmp_path / "images")
    save_model(create("test_resnet"), tmp_path / "saved")
    with pytest.raises(UserError, match="--faim-blocks with the saved model .* Give them all"):
        train_tiny(data, tmp_path, "--faim-blocks", "1", model=f"local-dir:{tmp_path / 'saved'}")


def test_blocks_that_are_not_there_end_a_training_before_it_begins(tmp_path):
    data = make_images(tmp_path / "images")
    with pytest.raises(UserError, match="cannot create faim_test_resnet: faim_cfg blocks=5: .* has 1: layer1.0"):
        train_tiny(data, tmp_path, "--faim-blocks", "5")
