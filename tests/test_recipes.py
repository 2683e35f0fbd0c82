"""The shipped recipes: every key is a flag, the pretrained weights exist, and an epoch runs with the settings."""

import re
from pathlib import Path

import pytest
import timm
import yaml
from runs import make_images, read_summary, train, values_of
from timm.models import get_pretrained_cfg

import timm_faim  # noqa: F401
from timm_faim.models.config import resolve_faim_cfg
from timm_faim.training.args import parse_args

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "timm_faim" / "configs").glob("*.yaml"))
FINE_TUNING = [path for path in RECIPES if path.stem.startswith("finetune")]
TINY_MODEL = {"finetune_vit": "test_vit", "finetune_vit_abc": "test_vit"}  # test_resnet for the others
# What a generated folder needs instead of a recipe's own data and weights; the rest stays as the recipe says.
SMALL = [
    "--no-pretrained",
    "--img-size",
    "32",
    "--epochs",
    "1",
    "--warmup-epochs",
    "0",
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--cpu-threads",
    "1",
    "--no-report",
]


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def run_small(path, images, output, prefix):
    model = prefix + TINY_MODEL.get(path.stem, "test_resnet")
    data = ["--dataset=", "--val-split", "validation", "--data-dir", images]
    train("--config", path, *data, "--model", model, *SMALL, "--output", output, "--experiment", "run")
    return output / "run"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def test_there_are_four():
    assert [path.stem for path in RECIPES] == ["finetune_cnn", "finetune_vit", "finetune_vit_abc", "omniglot"]


@by_name(RECIPES)
def test_options_are_what_the_recipe_says(path):
    args = vars(values_of(parse_args(["--config", str(path), "--data-dir", "d"])))
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert args[key] == value, key


@by_name(RECIPES)
def test_model_exists_with_its_weights(path):
    args = parse_args(["--config", str(path), "--data-dir", "d"]).model
    assert timm.is_model(args.model.split(".")[0])
    if args.pretrained:  # an unknown tag gives no config
        name, tag = args.model.split(".")
        cfg = get_pretrained_cfg(args.model)
        assert cfg is not None and cfg.has_weights and cfg.tag == tag
        assert cfg.hf_hub_id == f"timm/{name.removeprefix('faim_')}.{tag}"


@by_name(FINE_TUNING)
def test_fine_tuning_starts_from_pretrained_weights(path):
    assert parse_args(["--config", str(path), "--data-dir", "d"]).model.pretrained


@by_name(RECIPES)
def test_one_epoch_runs_with_the_recipes_settings(path, images, tmp_path):
    run = run_small(path, images, tmp_path, "faim_")
    *start, row = read_summary(run)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    used = yaml.safe_load((run / "args.yaml").read_text(encoding="utf-8"))
    kept = ("opt", "lr", "weight_decay", "faim_cfg", "smoothing", "sched", "scale", "layer_decay", "drop_path")
    assert {key: used.get(key) for key in kept if key in recipe} == {key: recipe[key] for key in kept if key in recipe}
    assert row["eval_samples"] == "7" and len(start) == (recipe.get("head_init") == "data")
    assert float(row["train_gamma"]) == pytest.approx(resolve_faim_cfg(recipe["faim_cfg"])["scale_init"], rel=0.05)


@by_name(RECIPES)
def test_the_linear_twin_runs_with_the_same_recipe(path, images, tmp_path):
    (row,) = read_summary(run_small(path, images, tmp_path, ""))
    assert row["eval_samples"] == "7" and "train_gamma" not in row


@by_name(RECIPES)
def test_command_lines_of_the_header_parse(path):
    header = path.read_text(encoding="utf-8")
    commands = re.findall(r"^#   (accelerate launch train_faim\.py(?:.*\\\n#)*.*)", header, re.MULTILINE)
    assert len(commands) == (2 if path in FINE_TUNING else 0)  # the usual one, and the one that was run
    for command in commands:
        words = re.sub(r"\\\n#", " ", command).split()[3:]
        args = parse_args([str(ROOT / w) if w.endswith(".yaml") else w for w in words])
        assert Path(args.config).name == path.name
