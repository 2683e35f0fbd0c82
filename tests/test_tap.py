"""What enters a model's heads, captured in one place."""

import copy

import pytest
import timm
import torch
from torch import nn

from timm_faim import FAIMHead, faim_heads
from timm_faim.head.tap import Tap, eval_mode, layer_inputs, pooled

D, C = 6, 3


def batches(sizes):
    return [(torch.randn(size, D), number) for number, size in enumerate(sizes)]


class Sometimes(nn.Module):
    """Reaches its second head for batches of more than two."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Dropout(0.5), FAIMHead(D, C), FAIMHead(D, C)

    def forward(self, x):
        x = self.body(x)
        return self.first(x) + (self.second(2 * x) if len(x) > 2 else 0)


def test_inputs_of_each_batch_alone_without_gradients_and_modes_restored():
    model = Sometimes().train()
    model.second.eval()
    given = batches([4, 2, 3])
    seen = list(layer_inputs(model, faim_heads(model), given))
    assert [number for _, number in seen] == [0, 1, 2]
    assert [sorted(inputs) for inputs, _ in seen] == [["first", "second"], ["first"], ["first", "second"]]
    for (inputs, _), (x, _) in zip(seen, given, strict=True):
        assert torch.equal(inputs["first"], x) and not inputs["first"].requires_grad
    assert torch.equal(seen[0][0]["second"], 2 * given[0][0])
    assert model.training and model.body.training and model.first.training and not model.second.training


def test_an_error_takes_the_hooks_off_and_restores_the_modes():
    model = Sometimes().train()
    with pytest.raises(RuntimeError):
        list(layer_inputs(model, faim_heads(model), [(torch.randn(2, D + 1), 0)], lambda x: x @ torch.ones(3)))
    assert model.training and not model.first._forward_pre_hooks
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert model.training


def test_a_tap_keeps_the_graph_and_serves_copies_while_it_is_open():
    model = Sometimes().eval()
    tap = Tap({"head": model.first})
    copied = copy.deepcopy(model)
    x = torch.randn(2, D, requires_grad=True)
    model(x)
    assert tap.take() == {}
    for m in (model, copied):
        with tap:
            m(2 * x)
        inputs = tap.take()
        assert inputs["head"].requires_grad and torch.equal(inputs["head"], 2 * x)
    assert tap.take() == {}
    tap.remove()
    with tap:
        model(x)
    assert tap.take() == {}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_inputs_give_the_models_logits(name):
    model = timm.create_model(f"faim_{name}", num_classes=C).eval()
    head = next(iter(faim_heads(model).values()))
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    ((inputs, _),) = layer_inputs(model, {"head": head}, [(x, None)])
    with torch.no_grad():
        assert torch.equal(head(inputs["head"]), model(x))


def test_maps_and_tokens_are_averaged():
    x = torch.randn(2, D)
    assert torch.equal(pooled(x, D), x)
    assert torch.allclose(pooled(x[:, :, None, None].expand(2, D, 3, 4), D), x)
    assert torch.allclose(pooled(x[:, None].expand(2, 5, D), D), x)
    assert torch.allclose(pooled(x[:, None, None].expand(2, 5, 4, D), D), x)
