"""FAIM heads on timm's architectures: shapes on the meta device for all of them, real steps for one of each file.

By default every 24th architecture and the hard cases run; ``pytest tests/test_architectures.py --slow -n auto`` runs
all of them (about 20 minutes of one core).
"""

import pytest
import timm
import torch
from torch import nn

from timm_faim import faim_heads
from timm_faim.models import has_classifier

ALL = [name for name in timm.list_models() if not name.startswith("faim_") and has_classifier(name)]

# one of each way in which a classifier can sit in a model
HARD = {
    "beit_base_patch16_224", "cait_xxs24_224", "coat_tiny", "convnext_atto", "cpubone_nano", "crossvit_tiny_240",
    "deit_tiny_distilled_patch16_224", "dla46x_c", "dpn48b", "efficientformer_l1", "efficientformerv2_s0",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "fastvit_t8", "iformer_m_distilled", "inception_next_atto",
    "inception_v3", "levit_384_s8", "levit_conv_128s", "nasnetalarge", "nextvit_small", "pit_ti_distilled_224",
    "pnasnet5large", "poolformerv2_s12", "repvit_m1", "resnet50_clip", "resnetv2_50x1_bit", "shvit_s1",
    "swiftformer_xs", "volo_d1_224", "vit_base_patch16_siglip_224", "naflexvit_base_patch16_gap",
}  # fmt: skip

# the cheapest member of each model file of timm, cheapest first
SMALL = """
test_byobnet test_convnext test_efficientnet test_mambaout test_nfnet test_coatnet test_resnet test_vit lcnet_035
starnet_s050 test_vit_relpos dla46x_c repghostnet_050 mobilevit_xxs ghostnet_050 ese_vovnet19b_slim_dw edgenext_xx_small
efficientvit_b0 efficientvit_m0 regnetx_002 cspnext_tiny fasternet_t0 iformer_t lcnetv2_small xcit_nano_12_p8_224
swiftformer_xs efficientformerv2_s0 inception_next_atto pvt_v2_b0 rexnet_100 cs3darknet_focus_s hardcorenas_b
hgnetv2_b0 fastvit_t8 pit_ti_224 repvit_m1 cpubone_nano tiny_vit_5m_224 coat_tiny convit_tiny deit_tiny_patch16_224
eva02_tiny_patch14_224 efficientvim_m1 gmlp_ti16_224 shvit_s1 vit_tiny_r_s16_p8_224 densenet121 levit_128s
crossvit_tiny_240 dpn48b resnest14d halonet_h1 visformer_tiny hrnet_w18_small resnetv2_18 legacy_seresnet18
efficientformer_l1 poolformerv2_s12 skresnet18 gcvit_xxtiny cait_xxs24_224 lowformer_b0
vitamin_small_224 res2next50 rdnet_tiny mvitv2_tiny tnt_s_legacy_patch16_224 twins_svt_small volo_d1_224
hiera_tiny_224 nest_tiny sequencer2d_s swin_tiny_patch4_window7_224 davit_tiny swinv2_cr_tiny_224 focalnet_tiny_srf
selecsls42 tresnet_m nextvit_small swinv2_tiny_window8_256 legacy_xception inception_v3 xception41p hieradet_small
""".split()
SMALL_BUT_SLOW = """
convmixer_768_32 csatv2 inception_v4 samvit_base_patch16_224 beit_base_patch16_224 inception_resnet_v2 vgg11
mobilenetv5_base pnasnet5large nasnetalarge naflexvit_base_patch16_parfac_gap qwen3_vit_88m
gemma4_vit_167m deepseek_vit_412m
""".split()


def slow_if(condition):
    return pytest.mark.slow if condition else ()


def arch_params():
    return [pytest.param(a, marks=slow_if(i % 24 and a not in HARD)) for i, a in enumerate(ALL)]


def remaining_linear_classifiers(model, num_classes):
    """Linear layers of ``num_classes`` outputs where the config names a classifier."""
    named = model.pretrained_cfg.get("classifier") or ()
    named = (named,) if isinstance(named, str) else named
    modules = dict(model.named_modules())
    linear = [n for n in named if isinstance(modules.get(n), (nn.Linear, nn.Conv2d))]
    return [n for n in linear if modules[n].weight.shape[0] == num_classes]


@pytest.mark.parametrize("arch", arch_params())
def test_on_the_meta_device(arch):
    with torch.device("meta"):
        model = timm.create_model(f"faim_{arch}", num_classes=7)
    heads = set(faim_heads(model))
    assert heads and not remaining_linear_classifiers(model, 7)
    x = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
    model.eval()
    assert model(x).shape == (2, 7)
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    widths = {head.in_features for head in faim_heads(model).values()}
    if isinstance(pre_logits, torch.Tensor):  # CrossViT gives one a branch
        assert 7 not in pre_logits.shape or widths & set(pre_logits.shape)
    parameters = {name for name, _ in model.named_parameters()}
    for name in heads:
        assert {f"{name}.mu", f"{name}.scale", f"{name}.metric.beta"} <= parameters & model.no_weight_decay()
    model.reset_classifier(5)
    kept = set(faim_heads(model))  # timm drops the distillation head of RepViT and iFormer on a reset
    assert kept and kept <= heads and all(head.num_classes == 5 for head in faim_heads(model).values())
    assert not remaining_linear_classifiers(model, 5)
    model.reset_classifier(0)
    assert not faim_heads(model)
    model.reset_classifier(6)
    assert set(faim_heads(model)) == kept and model.num_classes == 6


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=slow_if(a in SMALL_BUT_SLOW)) for a in SMALL + SMALL_BUT_SLOW if timm.is_model(a)]
)
def test_real_forward_and_backward(arch):
    model = timm.create_model(f"faim_{arch}", num_classes=3).train()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    output = model(x)
    outputs = output if isinstance(output, (tuple, list)) else [output]
    assert outputs[0].shape == (2, 3) and all(torch.isfinite(o).all() for o in outputs)
    # the sum of all logits does not depend on the classes' order; a weighted one reaches every prototype
    loss = sum((o * torch.arange(1.0, o.numel() + 1).view_as(o) / o.numel()).sum() for o in outputs)
    loss.backward()
    for name, head in faim_heads(model).items():
        assert head.mu.grad is not None and torch.isfinite(head.mu.grad).all(), name
        assert head.mu.grad.abs().sum() > 0, name
    first = next(p for p in model.parameters() if p.requires_grad)
    assert first.grad is not None and torch.isfinite(first.grad).all()


def test_every_model_file_has_a_real_step():
    covered = {timm.models.model_entrypoint(a).__module__ for a in SMALL + SMALL_BUT_SLOW if timm.is_model(a)}
    files = {timm.models.model_entrypoint(a).__module__ for a in ALL}
    assert files == covered
