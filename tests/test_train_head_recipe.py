"""--head-recipe auto: the share of the closed-form fits, chosen once before the training."""

import pytest
import timm
import torch
import yaml
from fitted import save_backbone
from runs import make_images, train_tiny
from safetensors.torch import load_file

import timm_faim
from timm_faim.run.errors import UserError
from timm_faim.training.args import parse_args

AUTO = ["--head-init", "data", "--head-recipe", "auto"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), train=9)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


def recipe_of(run):
    saved = yaml.safe_load((run / "args.yaml").read_text())
    return {name: saved[name] for name in ("head_recipe", "head_share")}


def start(images, output, weights, *argv):
    return train_tiny(images, output, "--pretrained-path", weights, "--epochs", "0", *argv)


def test_the_start_is_fitted_as_is_chosen_and_said(images, weights, tmp_path, capsys):
    chosen = start(images, tmp_path / "a", weights, *AUTO)
    said = capsys.readouterr().out
    recipe = recipe_of(chosen)
    assert recipe["head_recipe"] == "fixed"
    words = f"recipe: pooled features; shrinkage 0.3; sharing {recipe['head_share']:g}"
    assert words in said and "held-out training images, accuracy by class:" in said
    given = ["--head-share", recipe["head_share"], "--head-init", "data"]
    again = start(images, tmp_path / "b", weights, *given)
    one, two = (load_file(run / "last.safetensors") for run in (chosen, again))
    torch.testing.assert_close(one["fc.mu"], two["fc.mu"])


def test_what_is_given_stands_and_is_used(images, weights, tmp_path):
    shared = start(images, tmp_path / "a", weights, *AUTO, "--head-share", "20", "--head-shrinkage", "0.9")
    assert recipe_of(shared) == {"head_recipe": "fixed", "head_share": 20.0}
    plain = start(images, tmp_path / "b", weights, "--head-init", "data")
    one, two = (timm.create_model(f"local-dir:{run}", pretrained=True).fc for run in (shared, plain))
    assert not torch.allclose(one.mu, two.mu, atol=1e-3) and isinstance(one, timm_faim.FAIMHead)


def test_a_run_that_goes_on_does_not_choose_again(images, weights, tmp_path, monkeypatch):
    words = ["--pretrained-path", weights, *AUTO, "--head-refit", "0", "--resume", "auto"]
    run = train_tiny(images, tmp_path, *words, "--epochs", "2", "--stop-epoch", "1")
    before = recipe_of(run)
    monkeypatch.setattr("timm_faim.training.head_recipe.choose", lambda *args, **options: pytest.fail("it chooses"))
    train_tiny(images, tmp_path, *words, "--epochs", "2")
    assert recipe_of(run) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--data-dir", ".", "--head-recipe", "auto", "--pretrained"],
            "of heads in closed form: give --head-init data or --head-refit",
        ),
        (AUTO, "looks through a pretrained backbone: give --pretrained or"),
        (
            [*AUTO, "--pretrained", "--multi-label", "--dataset", "hfds/x", "--num-classes", "3"],
            "--head-recipe auto does not go with --multi-label",
        ),
        (["--head-share", "101"], "must be a number in 0..100, got 101"),
        (["--head-shrinkage", "0"], "must be a number > 0 and <= 1, got 0"),
    ],
)
def test_what_does_not_go_together(argv, message):
    with pytest.raises(UserError, match=message):
        parse_args(["--model", "faim_test_resnet", *argv])


def test_heads_that_have_no_choice(images, weights, tmp_path):
    with pytest.raises(UserError, match="is for models with one head in the space"):
        start(images, tmp_path, weights, *AUTO, "--faim-cfg", "space=sphere")
