"""Where second moments are taken: exact stages of the families, and the real output of some of them."""

import pytest
import timm
import torch
from test_architectures import SMALL, SMALL_BUT_SLOW, slow_if

from timm_faim.models.stages import Stage, find_stage

# name, channels, channels last, prefix, item, positions
USUAL = {
    "tf_efficientnet_lite0": ("blocks.4.2", 112, False, 0, -1, 196),
    "resnet50": ("layer3.5", 1024, False, 0, -1, 196),
    "resnet10t": ("layer3.0", 256, False, 0, -1, 121),
    "vgg11": ("features.19", 512, False, 0, -1, 196),
    "densenet121": ("features.denseblock3", 1024, False, 0, -1, 196),
    "inception_v3": ("Mixed_6e", 768, False, 0, -1, 289),
    "mobilenetv3_small_050": ("blocks.3.1", 24, False, 0, -1, 196),
    "convnext_atto": ("stages.2.blocks.5", 160, False, 0, -1, 196),
    "mambaout_femto": ("stages.2.blocks.8", 192, True, 0, -1, 196),
    "swin_tiny_patch4_window7_224": ("layers.2.blocks.5", 384, True, 0, -1, 196),
    "nest_tiny": ("levels.2.transformer_encoder.3", 384, True, 0, -1, 196),  # [B, windows, N, c]
    "mvitv2_tiny": ("stages.2.blocks.4", 384, False, 0, 0, 196),  # (tokens, size)
    "tnt_s_patch16_224": ("blocks.7", 384, False, 1, 1, 196),  # (pixels, patches)
    "pit_ti_224": ("transformers.1.blocks.5", 128, False, 1, -1, 196),
    "pit_ti_distilled_224": ("transformers.1.blocks.5", 128, False, 2, -1, 196),
    "coat_tiny": ("serial_blocks3.1", 152, False, 1, -1, 196),
    # one resolution: two thirds of the way
    "vit_tiny_patch16_224": ("blocks.7", 192, False, 1, -1, 196),
    "deit_tiny_distilled_patch16_224": ("blocks.7", 192, False, 2, -1, 196),
    "vit_small_patch14_reg4_dinov2": ("blocks.7", 384, False, 5, -1, 1369),
    "cait_xxs24_224": ("blocks.15", 192, False, 0, -1, 196),
    "convmixer_768_32": ("blocks.21.0", 768, False, 0, -1, 1024),
}
REFUSING = {"selecsls42": "no block .* gives one map"}  # all its blocks pass lists on


@pytest.mark.parametrize("arch", USUAL)
def test_the_stage_of_a_family(arch):
    assert find_stage(arch, {}) == Stage(*USUAL[arch])


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=slow_if(a in SMALL_BUT_SLOW)) for a in SMALL + SMALL_BUT_SLOW if timm.is_model(a)]
)
def test_every_file_of_timm_has_a_stage_or_says_why_not(arch):
    if arch in REFUSING:
        with pytest.raises(ValueError, match=f"moments: {REFUSING[arch]}.*; leave moments out"):
            find_stage(arch, {})
        return
    stage = find_stage(arch, {})
    assert stage.channels >= 8 and stage.positions >= 49 and 0 <= stage.prefix <= 5


def test_inputs_move_the_positions_alone():
    assert find_stage("resnet50", {"in_chans": 1}) == find_stage("resnet50", {})
    assert find_stage("vit_tiny_patch16_224", {"img_size": 96}) == Stage("blocks.7", 192, False, 1, -1, 36)
    assert find_stage("vit_tiny_patch16_224", {"img_size": (96, 192)}) == Stage("blocks.7", 192, False, 1, -1, 72)
    no_token = find_stage("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"})
    assert no_token == Stage("blocks.7", 192, False, 0, -1, 196)
    assert find_stage("swin_tiny_patch4_window7_224", {"img_size": (224, 448)}).positions == 392


REAL = ["test_resnet", "test_vit", "test_convnext", "test_mambaout", "deit_tiny_distilled_patch16_224",
        "mobilenetv3_small_050", "mvitv2_tiny", "tnt_s_patch16_224", "nest_tiny", "pit_ti_distilled_224", "coat_tiny",
        "convit_tiny", "volo_d1_224", "densenet121", "crossvit_tiny_240"]  # fmt: skip


@pytest.mark.parametrize("arch", REAL)
def test_a_real_pass_gives_what_the_stage_says(arch):
    stage, model, seen = find_stage(arch, {}), timm.create_model(arch, num_classes=3).eval(), []
    model.get_submodule(stage.name).register_forward_hook(
        lambda _, inputs, output: seen.append((output, version(output)))
    )

    def version(output):
        x = output if stage.item < 0 else output[stage.item]
        return x._version

    with torch.no_grad():
        model(torch.randn(2, *model.pretrained_cfg["input_size"]))
    ((output, before),) = seen
    assert version(output) == before, "a later layer writes into the map"
    assert isinstance(output, torch.Tensor) == (stage.item < 0)
    x = output if stage.item < 0 else output[stage.item]
    tokens = x if x.dim() == 3 else x.flatten(1, 2) if stage.channels_last else x.flatten(2).transpose(1, 2)
    assert tokens.shape == (2, stage.positions + stage.prefix, stage.channels)


@pytest.mark.parametrize(("arch", "wanted", "name", "channels"), [
    ("resnet50", "layer3", "layer3.5", 1024),  # a stage: its last block
    ("resnet50", "layer3.2", "layer3.2", 1024),  # a block
    ("resnet50", "layer2", "layer2.3", 512),
    ("tf_efficientnet_lite0", "blocks.4", "blocks.4.2", 112),
    ("tf_efficientnet_lite0", "blocks.4.0", "blocks.4.0", 112),
    ("convnext_atto", "stages.1", "stages.1.blocks.1", 80),
    ("swin_tiny_patch4_window7_224", "layers.1", "layers.1.blocks.1", 192),
    ("vit_tiny_patch16_224", "blocks.11", "blocks.11", 192),
    ("densenet121", "features.denseblock3", "features.denseblock3", 1024),  # gives more than its last layer
    ("resnet50", "maxpool", "maxpool", 64),  # no block, but a map
    ("vit_tiny_patch16_224", "patch_drop", "patch_drop", 192),
    ("resnet50", "layer3.5.act3", "layer3.5.act3", 1024),
])  # fmt: skip
def test_a_stage_by_name(arch, wanted, name, channels):
    stage = find_stage(arch, {}, wanted)
    assert (stage.name, stage.channels) == (name, channels)


@pytest.mark.parametrize(("arch", "wanted", "message"), [
    ("resnet50", "layer_3", r"moments='layer_3' is no module of faim_resnet50; did you mean 'layer3'\?"),
    ("resnet50", "layer3.6", r"is no module of faim_resnet50; did you mean 'layer3.[0-5]'\?.*there are layer1\.0"),
    ("tf_efficientnet_lite0", "block.4", r"did you mean 'blocks.4'\?"),
    ("resnet50", "zzz", r"is no module of faim_resnet50; there are layer1"),
    ("resnet50", "fc", r"moments='fc' gives no map or tokens, or not once"),
    ("resnet50", "global_pool", "gives no map or tokens"),
    ("vit_tiny_patch16_224", "blocks.3.attn.attn_drop", "gives no map or tokens, or not once"),  # fused: never called
])  # fmt: skip
def test_a_name_that_is_no_stage(arch, wanted, message):
    with pytest.raises(ValueError, match=message):
        find_stage(arch, {}, wanted)


def test_the_search_moves_no_generator():
    state = torch.get_rng_state()
    find_stage("test_resnet", {})
    assert torch.equal(torch.get_rng_state(), state)
