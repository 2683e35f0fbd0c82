"""Sharded models: FSDP2 itself on the CPU; through Accelerate it needs several GPUs."""

from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.utils import DistributedType, is_torch_version
from children import in_group

from timm_faim import TargetMargin
from timm_faim.run.errors import UserError
from timm_faim.run.summary import head_metrics
from timm_faim.training.launch import repeated_blocks, wrap_repeated_blocks


def build():
    torch.manual_seed(0)
    return timm.create_model("faim_test_vit", img_size=32, num_classes=5, faim_cfg=dict(margin=0.3, prior=True))


def gradients_are_those_of_one_process():
    """The margin reads γ outside the model's forward, where FSDP2 keeps it sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, sharded = build().train(), build().train()
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    generator = torch.Generator().manual_seed(1)
    images, target = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(5, (8,), generator=generator)
    TargetMargin(torch.nn.CrossEntropyLoss(), whole)(whole(images), target).backward()
    rank = torch.distributed.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    TargetMargin(torch.nn.CrossEntropyLoss(), sharded)(sharded(images[mine]), target[mine]).backward()
    for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        if a.grad is None:
            assert not a.requires_grad and b.grad is None, name
            continue
        difference = (b.grad.full_tensor() - a.grad).abs().max()
        assert difference <= 1e-4 * a.grad.abs().max(), name
    assert head_metrics(sharded) == head_metrics(whole)


def a_channels_last_model_is_sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = timm.create_model("faim_test_resnet", num_classes=5).to(memory_format=torch.channels_last)
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=[])
    state = SimpleNamespace(fsdp_plugin=plugin)
    wrap_repeated_blocks(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state), model)
    assert plugin.transformer_cls_names_to_wrap == repeated_blocks(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)).sum().backward()


needs_fsdp_on_cpu = pytest.mark.skipif(
    is_torch_version("<", "2.7"), reason="FSDP2 of torch 2.6 has no streams on the CPU"
)


@needs_fsdp_on_cpu
def test_a_channels_last_model_can_be_sharded():
    in_group(a_channels_last_model_is_sharded)


@needs_fsdp_on_cpu
def test_gradients_of_a_sharded_model():
    in_group(gradients_are_those_of_one_process)


def test_units_of_sharding_are_the_repeated_blocks():
    assert repeated_blocks(build()) == ["Block"]
    assert repeated_blocks(timm.create_model("resnet18")) == ["BasicBlock"]
    charted = timm.create_model("faim_vit_tiny_patch16_224", faim_cfg=dict(blocks=2))
    assert repeated_blocks(charted) == ["Block", "ChartedBlock"]
    charted = timm.create_model("faim_vit_tiny_patch16_224", faim_cfg=dict(blocks=2, block_shared=True))
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=object()))
    with pytest.raises(UserError, match="block_shared=True does not go with FSDP"):
        wrap_repeated_blocks(accelerator, charted)
    assert repeated_blocks(timm.create_model("convnext_atto")) == ["ConvNeXtBlock", "ConvNeXtStage"]
