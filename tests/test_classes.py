"""Classes added, removed, merged and renamed without training: what changes, what stays, and what is refused."""

import copy
import logging
import math

import pytest
import timm
import torch
from torch import nn

from timm_faim import add_classes, faim_heads, fit_, merge_classes, remove_classes, rename_classes
from timm_faim.classes import class_names
from timm_faim.head.tap import layer_inputs

NAMES = ["ant", "bee", "cat", "dog"]
SMALL = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2}
MODELS = {
    "plain": ("faim_test_resnet", {}),
    "two heads": ("faim_deit_tiny_distilled_patch16_224", SMALL),
    "moments": ("faim_test_resnet", {"faim_cfg": {"moments": {"components": 6, "rank": 4}}}),
    "flat": ("faim_test_resnet", {"faim_cfg": {"preset": "flat", "prior": True}}),
    "sphere": ("faim_test_resnet", {"faim_cfg": {"space": "sphere"}}),
    "one-form": ("faim_test_resnet", {"faim_cfg": {"lambda_init": 0.2, "prior": True}}),
    "attention pool": ("faim_test_vit4", {}),
}
each_model = pytest.mark.parametrize("kind", MODELS)


def images_of(k: int, n: int = 8, seed: int = 0) -> torch.Tensor:
    """n images [n, 3, 32, 32] of class k: stripes of its own width and colour, and noise."""
    generator = torch.Generator().manual_seed(100 * k + seed)
    stripes = torch.sin(torch.arange(32.0) * (0.4 + 0.35 * k)).expand(3, 32, 32).clone()
    stripes[k % 3] += 1.0
    return stripes + 0.3 * torch.randn(n, 3, 32, 32, generator=generator)


def make(kind: str = "plain", names: list[str] | None = NAMES, fitted: bool = True) -> nn.Module:
    arch, arguments = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=4, **arguments).eval()
    if names:
        model.pretrained_cfg["label_names"] = tuple(names)
    if fitted:
        fit_(model, [(images_of(k), torch.full((8,), k)) for k in range(4)])
    for head in faim_heads(model).values():
        nn.init.uniform_(head.mu, *(0.9, 1.1)) if not fitted else head.mu.data.mul_(
            torch.linspace(0.5, 2.0, 4)[:, None]
        )
        if head.prior is not None:
            head.prior.data.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    return model


def state(model: nn.Module) -> dict:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "said": (model.num_classes, copy.deepcopy(model.pretrained_cfg), copy.deepcopy(model._model_args)),
        "modes": [module.training for module in model.modules()],
    }


def assert_same(before: dict, after: dict, besides: tuple[str, ...] = ()) -> None:
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        if not name.endswith(besides or "\0"):
            assert torch.equal(tensor, after["tensors"][name]), name
    assert before["modes"] == after["modes"]


def assert_number_everywhere(model: nn.Module, number: int) -> None:
    assert (
        model.num_classes == model.pretrained_cfg["num_classes"] == len(model.pretrained_cfg["label_names"]) == number
    )
    assert model._model_args.get("num_classes", number) == number
    for head in faim_heads(model).values():
        assert head.num_classes == head.out_features == len(head.mu) == number
    holders = [m for m in model.modules() if isinstance(getattr(m, "num_classes", None), int)]
    assert {m.num_classes for m in holders} == {number}
    x = images_of(0).to(next(model.parameters()).dtype)
    assert model(x).shape == (8, number)


@each_model
@torch.no_grad()
def test_an_added_class_is_recognised_and_the_others_stay(kind):
    model = make(kind).double()
    before, x = state(model), torch.cat([images_of(k, seed=1) for k in range(4)]).double()
    logits = model(x)
    assert add_classes(model, {"elk": images_of(4, 5).double()}, images=[8, 8, 8, 8]) == [8, 8, 8, 8, 5]
    assert_number_everywhere(model, 5)
    assert class_names(model) == [*NAMES, "elk"]
    assert_same(before, state(model), besides=("mu", "prior"))
    for name, head in faim_heads(model).items():
        assert torch.equal(head.mu[:4], before["tensors"][f"{name}.mu"])
        if head.prior is not None:
            assert torch.equal(head.prior[:4], before["tensors"][f"{name}.prior"])
            assert head.prior[4].item() == pytest.approx(0.05)
    # a product of another width may round otherwise
    torch.testing.assert_close(model(x)[:, :4], logits, rtol=1e-10, atol=1e-10)
    assert (model(images_of(4, seed=1).double()).argmax(1) == 4).float().mean() > 0.8


@each_model
@torch.no_grad()
def test_the_prototype_is_that_of_the_closed_form(kind):
    """A fit on all images by the frame of the old head gives the same point."""
    model = make(kind)
    few = images_of(4, 5)
    ((seen, _),) = layer_inputs(model, faim_heads(model), [(few, None)])
    lengths = {name: head.mu.norm(dim=1).median() for name, head in faim_heads(model).items()}
    add_classes(model, {"elk": [few[:2], few[2:]]})
    for name, head in faim_heads(model).items():
        x = seen[name].double()
        wanted = head.embed(x).mean(0) if head.space == "sphere" else head.embed(x.mean(0))  # flat: embed gives x
        new = head.mu[4].double()
        if not head.is_flat:
            wanted, new = wanted / wanted.norm(), new / new.norm()
            torch.testing.assert_close(head.mu[4].norm(), lengths[name])
        torch.testing.assert_close(new, wanted, rtol=1e-4, atol=1e-5)


def test_removing_what_was_added_leaves_everything_as_it_was():
    model = make("moments")
    before, cfg = state(model), dict(model.pretrained_cfg)
    images = add_classes(model, {"elk": images_of(4, 3), "fox": images_of(5, 2)}, images=[1, 2, 3, 4])
    assert images == [1, 2, 3, 4, 3, 2]
    assert remove_classes(model, ["fox", "elk"], images=images) == [1, 2, 3, 4]
    assert_same(before, state(model))
    assert model.pretrained_cfg == cfg | {"num_classes": 4}


@each_model
@torch.no_grad()
def test_removed_classes_are_gone_and_the_others_keep_their_rows(kind):
    model = make(kind)
    before = state(model)
    assert remove_classes(model, ["bee", "ant"]) is None
    assert class_names(model) == ["cat", "dog"]
    assert_number_everywhere(model, 2)
    for name, head in faim_heads(model).items():
        assert torch.equal(head.mu, before["tensors"][f"{name}.mu"][2:])
    assert (model(images_of(3, seed=1)).argmax(1) == 1).float().mean() > 0.8


@each_model
@torch.no_grad()
def test_a_merged_class_is_the_weighted_mean_of_the_points(kind):
    model = make(kind)
    heads = {name: copy.deepcopy(head) for name, head in faim_heads(model).items()}
    assert merge_classes(model, {"insect": ["cat", "ant"]}, images=[6, 5, 2, 7]) == [8, 5, 7]
    assert class_names(model) == ["insect", "bee", "dog"]
    assert_number_everywhere(model, 3)
    for name, head in faim_heads(model).items():
        old = heads[name]
        assert torch.equal(head.mu[1:], old.mu[[1, 3]])
        points = old.project(old.mu.double())
        wanted = 0.75 * points[0] + 0.25 * points[2]
        row = head.mu[0].double()
        if len(old.parts) > 1:  # each part points where its mean does, and is as long as its parts were
            for part, whole in zip(row.split(old.parts), wanted.split(old.parts), strict=True):
                torch.testing.assert_close(part / part.norm(), whole / whole.norm(), rtol=1e-4, atol=1e-6)
            shares = [part.norm() / row.norm() for part in row.split(old.parts)]
            torch.testing.assert_close(torch.stack(shares).square(), old.part_weights.double(), rtol=1e-4, atol=1e-5)
        else:
            factor = 1.0 if old.is_flat else old.mu.double().norm(dim=1).median() / wanted.norm()
            torch.testing.assert_close(row, wanted * factor, rtol=1e-4, atol=1e-6)
        if old.prior is not None:
            assert head.prior[0].item() == pytest.approx(math.log(math.exp(0.1) + math.exp(0.3)))


@torch.no_grad()
def test_without_numbers_of_images_classes_weigh_alike_and_it_is_said(caplog):
    model, other = make(), make()
    with caplog.at_level(logging.WARNING):
        assert merge_classes(model, {"both": ["ant", "bee"]}) is None
    assert "equal weights make both" in caplog.text
    merge_classes(other, {"both": ["ant", "bee"]}, images=[3, 3, 1, 1])
    assert torch.equal(model.get_classifier().mu, other.get_classifier().mu)


@torch.no_grad()
def test_images_are_taken_into_a_class_by_their_number():
    model, plain = make("flat"), make("flat")
    few = images_of(4, 2)
    assert add_classes(model, {"bee": few, "elk": few}, merge=True, images=[8, 6, 8, 8]) == [8, 8, 8, 8, 2]
    add_classes(plain, {"elk": few})
    mean = plain.get_classifier().mu[4]
    torch.testing.assert_close(model.get_classifier().mu[1], 0.75 * plain.get_classifier().mu[1] + 0.25 * mean)
    assert torch.equal(model.get_classifier().mu[4], mean)


@torch.no_grad()
def test_two_opposite_classes_can_be_merged():
    """Around the mean of all the points of two classes with as many images cancel."""
    model = make()
    remove_classes(model, ["cat", "dog"])
    head = model.get_classifier()
    head.mu[1] = -head.mu[0]
    merge_classes(model, {"all": ["ant", "bee"]})
    assert model(images_of(0)).isfinite().all() and head.mu.norm() > 0.1


def test_names_are_exchanged_and_descriptions_go_along():
    model = make()
    model.pretrained_cfg["label_descriptions"] = {"ant": "small", "dog": "loud"}
    before = state(model)
    rename_classes(model, {"ant": "bee", "bee": "ant", "dog": "hound"})
    assert class_names(model) == ["bee", "ant", "cat", "hound"]
    assert model.pretrained_cfg["label_descriptions"] == {"bee": "small", "hound": "loud"}
    assert_same(before, state(model))
    remove_classes(model, "hound")
    assert model.pretrained_cfg["label_descriptions"] == {"bee": "small"}


@each_model
def test_the_changed_model_trains_on(kind):
    model = make(kind)
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    margins = [head.margin for head in faim_heads(model).values()]
    add_classes(model, {"elk": images_of(4, 5)})
    remove_classes(model, ["bee"])
    merge_classes(model, {"pet": ["cat", "dog"]})
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learns
    assert [head.margin for head in faim_heads(model).values()] == margins
    x, y = torch.cat([images_of(0), images_of(2), images_of(4)]), torch.arange(3).repeat_interleave(8)
    y = (y + 1) % 3  # other than it has it
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.eval()  # batch norm of small batches is not what is tested
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(head.mu.grad.any() for head in faim_heads(model).values())
    copied = copy.deepcopy(model)
    copied.reset_classifier(6)
    assert copied(x).shape == (24, 6)


def test_classes_of_a_head_that_has_only_been_trained():
    model = make(fitted=False)
    add_classes(model, {"elk": images_of(4, 5)})
    assert_number_everywhere(model, 5)


LETTERS = "abc"


@pytest.mark.parametrize(("change", "message"), [
    (lambda m: add_classes(m, {"bee": images_of(4)}), "has class bee already; .* give merge"),
    (lambda m: add_classes(m, {}), "no classes to add"),
    (lambda m: add_classes(m, {"elk": images_of(4)[:0]}), "class 'elk' has no images"),
    (lambda m: add_classes(m, {"elk": images_of(4), "fox": []}), "class 'fox' has no images"),
    (lambda m: add_classes(m, {"elk": images_of(4)[0]}), r"'elk': images are tensors \[n, 3, H, W\].*\[3, 32, 32\]"),
    (lambda m: add_classes(m, {"elk": "folder"}), "class 'elk': .* got str"),
    (lambda m: add_classes(m, {"elk": images_of(4).byte()}), "floating-point numbers.*uint8"),
    (lambda m: add_classes(m, {"elk": images_of(4) * math.nan}), "image of class 'elk' are not finite"),
    (lambda m: add_classes(m, {" ": images_of(4)}), "one line of text, got ' '"),
    (lambda m: add_classes(m, {"elk": images_of(4)}, images=[1, 2]), "images must be .* each of the 4 classes"),
    (lambda m: add_classes(m, {"elk": images_of(4)}, label_names=LETTERS), "3 class names for 4 classes"),
    (lambda m: add_classes(m, {"elk": images_of(4)}, label_names="aabc"), "must differ, and a would stand twice"),
    (lambda m: remove_classes(m, NAMES), "at least one class, and all 4 would be removed"),
    (lambda m: remove_classes(m, ["dgo"]), r"no class 'dgo'. Did you mean dog\?"),
    (lambda m: remove_classes(m, ["dog", "dog"]), "dog is named twice"),
    (lambda m: merge_classes(m, {"pet": ["dog"]}), "'pet' is to be merged of 1 classes"),
    (lambda m: merge_classes(m, {"ant": ["dog", "cat"]}), "ant would stand twice"),
    (lambda m: merge_classes(m, {"x": ["dog", "cat"], "y": ["dog", "ant"]}), "dog is named twice"),
    (lambda m: merge_classes(m, {"pet": ["dog", "cut"]}), "no class 'cut'. Did you mean cat"),
    (lambda m: rename_classes(m, {"dog": "cat"}), "cat would stand twice"),
    (lambda m: rename_classes(m, {"elk": "x"}), "no class 'elk'"),
])  # fmt: skip
def test_what_is_refused_changes_nothing(change, message):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        change(model)
    assert_same(before, state(model))
    assert before["said"] == state(model)["said"]


def test_models_whose_classes_cannot_change():
    with pytest.raises(ValueError, match="no FAIM head.*faim_ name"):
        remove_classes(timm.create_model("test_resnet", num_classes=4), ["ant"])
    with pytest.raises(ValueError, match="no class names; give them.*label_names"):
        remove_classes(make(names=None), ["ant"])
    with pytest.raises(ValueError, match="no model of timm's"):
        remove_classes(nn.Sequential(make().get_classifier()), ["ant"])
    model = make(names=None)
    remove_classes(model, ["ant"], label_names=NAMES)
    assert class_names(model) == NAMES[1:]


def test_a_head_that_eval_mode_leaves_out_is_named():
    model = make("two heads")
    model.forward_head = lambda x, pre_logits=False: model.head(x[:, 0])
    with pytest.raises(ValueError, match="'head_dist' is not reached"):
        add_classes(model, {"elk": images_of(4)})
