"""What a saved or downloaded config.json may say: refused by name before anything is built."""

import json
import random
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from timm_faim.hub import save_model
from timm_faim.hub.package import Release, build_package, open_folder, read_config
from timm_faim.models.published import EntryError, read_entry
from timm_faim.models.saved import check_config
from timm_faim.retrieval.images import open_model
from timm_faim.run.errors import UserError
from timm_faim.training.args import parse_args
from timm_faim.training.model import build_model
from timm_faim.training.options import as_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("faim_test_resnet", num_classes=3, faim_cfg=dict(margin=0.3))
    return save_model(model, tmp_path_factory.mktemp("saved"), label_names=["a", "b", "c"])


@pytest.fixture
def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_saved_config_is_accepted(config):
    check_config(config)
    assert "num_classes" not in config["model_args"]  # transformers' wrapper of timm passes its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "faim_test_resnt"},
            "unknown architecture 'faim_test_resnt'; did you mean 'faim_test_resnet'",
        ),
        ({"architecture": None}, "architecture must be str, got None"),
        ({"num_classes": "3"}, "num_classes must be int, got '3'"),
        ({"pretrained_cfg": []}, "pretrained_cfg must be dict"),
        ({"model_args": {"faim_cfg": {"spaec": "flat"}}}, "unknown faim_cfg key 'spaec'; did you mean 'space'"),
        ({"model_args": {"faim_cfg": {"margin": 1e9, "prior": "yes"}}}, "must be bool"),
        ({"model_args": {"in_chans": 10**9}}, "in_chans must be a whole number in 1..1000000, got '1000000000'"),
        ({"model_args": {"img_size": [32, -1]}}, "img_size must be a whole number"),
        ({"model_args": {"embed_dim": 10**12}}, "embed_dim must not exceed 1000000"),
        ({"model_args": {"depths": [1, [2, [10**9]]]}}, "depths must not exceed 1000,"),
        ({"model_args": {"act_layer": "x" * 200_000}}, "act_layer is too long"),
        ({"model_args": {"layers": [100_000, 1, 1, 1]}}, "layers must not exceed 1000, got 100000"),
        ({"model_args": {"embed_dim": float("nan")}}, "embed_dim must not exceed 1000000, got nan"),
        ({"model_args": [["num_classes", 3]]}, "model_args must be dict"),
        ({"architecture": ["faim_test_resnet"]}, "architecture must be str"),
        ({"label_names": ["a", "b"]}, "2 label_names and 3 classes"),
        ({"label_names": "abc"}, "label_names must be a list of names"),
    ],
)
def test_a_wrong_config_is_refused_by_name(config, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_config(config | change)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_classes", 10**9, "num_classes must be a whole number in 0..1000000"),
        ("num_classes", True, "num_classes must be a whole number"),
        ("input_size", [3, 10**8, 32], "input_size must be three whole numbers in 1..1000000"),
        ("input_size", 5, "input_size must be three whole numbers in 1..1000000, got 5"),
        ("min_input_size", [3, 32], "min_input_size must be three whole numbers"),
        ("pool_size", [7], "pool_size must be two whole numbers"),
        ("mean", "x", "mean must be a list of finite numbers, got 'x'"),
        ("mean", [10**400], "mean must be a list of finite numbers"),
        ("std", [0.2, 0, 0.2], "std must be a list of finite numbers above 0"),
        ("std", [], "std must be a list of finite numbers above 0"),
        ("crop_pct", -5, "crop_pct must be a number in 0.01..10, got -5"),
        ("test_crop_pct", float("nan"), "test_crop_pct must be a number in 0.01..10, got nan"),
        ("interpolation", "cubic", "interpolation must be one of nearest, .* got 'cubic'"),
        ("crop_mode", ["center"], "crop_mode must be one of center, squash, border"),
        ("fixed_input_size", 1, "fixed_input_size must be true or false, got 1"),
        ("first_conv", 3, "first_conv must be the name of a layer, got 3"),
        ("url", "http://127.0.0.1/weights.pth", r"points at other weights \(pretrained_cfg.url\)"),
        ("hf_hub_filename", "../../etc/passwd", r"points at other weights \(pretrained_cfg.hf_hub_filename\)"),
        ("custom_load", True, "custom_load"),
        ("surprise", 1, "unexpected keyword argument 'surprise'"),
    ],
)
def test_a_wrong_pretrained_cfg_is_refused_by_name(config, key, value, message):
    config["pretrained_cfg"][key] = value
    with pytest.raises(ValueError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model_args", "in_chans", 10**9, "in_chans must be a whole number"),
        ("model_args", "faim_cfg", {"spaec": "flat"}, "unknown faim_cfg key 'spaec'"),
        ("model_args", "no_such_option", 1, "no_such_option"),
        ("pretrained_cfg", "hf_hub_filename", "../x.bin", "points at other weights"),
        ("pretrained_cfg", "custom_load", True, "custom_load"),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_opening_a_folder_checks_it_first(folder, config, tmp_path, section, key, value, message, pretrained):
    config[section][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises((ValueError, TypeError), match=message):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=pretrained)


def test_another_number_of_classes_loads_the_backbone(folder, caplog):
    saved = timm.create_model(f"local-dir:{folder}", pretrained=True)
    with caplog.at_level("INFO", logger="timm_faim"):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert [r.message for r in caplog.records] == [
        "FAIM head 'fc': checkpoint has 3 classes, model 5; the head starts fresh; centre and metric are the "
        "checkpoint's"
    ]
    head = model.get_classifier()
    assert head.mu.shape[0] == 5 and torch.equal(head.whiten, saved.get_classifier().whiten)
    assert torch.equal(model.conv1[0].weight, saved.conv1[0].weight)


def test_channels_last_and_shared_weights_are_saved(tmp_path):
    model = timm.create_model("faim_test_resnet", num_classes=3).to(memory_format=torch.channels_last).eval()
    again = timm.create_model(f"local-dir:{save_model(model, tmp_path)}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(model(images), again(images), atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "model_best.safetensors"}


def copied(folder, config, to):
    (to / "config.json").write_text(json.dumps(config))
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return f"local-dir:{to}"


def test_a_config_of_other_classes_than_its_weights_does_not_open_with_a_random_head(folder, config, tmp_path):
    config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 5
    config.pop("label_names", None)
    source = copied(folder, config, tmp_path)
    with pytest.raises(RuntimeError, match=r"config says 5 classes .* shape \[3, .*\]: they do not belong together"):
        timm.create_model(source, pretrained=True)
    with pytest.raises(UserError, match="config says 5 classes"):
        build_package(tmp_path, tmp_path / "package", Release("org/name"))
    assert timm.create_model(source, pretrained=True, num_classes=7).num_classes == 7


def test_prototypes_of_another_shape_are_named(folder, config, tmp_path):
    source = copied(folder, config, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"fc.mu": torch.zeros(())}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"3 classes and .* shape \[\]"):
        timm.create_model(source, pretrained=True)
    assert timm.create_model(source, pretrained=True, num_classes=7).num_classes == 7


def test_an_unknown_layer_is_one_line(folder, config, tmp_path):
    config["model_args"]["act_layer"] = "reluu"
    copied(folder, config, tmp_path)
    with pytest.raises(UserError, match="does not open with timm"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="cannot open --model"):
        open_model(str(tmp_path))


def test_weights_that_are_a_text_file_are_one_line(tmp_path):
    text = tmp_path / "weights.pth"
    text.write_text("no weights")
    args = parse_args(["--data-dir", "d", "--model", "faim_test_resnet", "--initial-checkpoint", str(text)])
    with pytest.raises(UserError, match="cannot create faim_test_resnet"):
        build_model(args, 3)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\xff\xfe", "[" * 100_000], ids=range(6))
def test_documents_of_no_use_are_one_line(folder, tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin1", errors="replace")
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    entry = tmp_path / "faim_test_resnet.x.yaml"
    entry.write_text(text.replace("[" * 100_000, "[" * 3000), encoding="latin1", errors="replace")
    with pytest.raises(EntryError):
        read_entry(entry)


def mutated(value, rng):
    """A value of JSON in which one thing is different."""
    strange = [None, True, -1, 0, 10**12, 1e308, float("nan"), "", "x" * 300_000, "é\u202e", [], {}, ["a"], {"a": 1},
               [[[[[[[[[[1]]]]]]]]]], "../../etc/passwd", "=cmd()"]  # fmt: skip
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        how = rng.random()
        if how < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.2:
            return value | {str(rng.choice(strange))[:50]: rng.choice(strange)}
        return value | {key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        return [mutated(value[0], rng), *value[1:]]
    return rng.choice(strange)


@pytest.mark.parametrize("rounds", [30, pytest.param(5000, marks=pytest.mark.slow)])
def test_fuzz_of_configs_entries_and_options(config, tmp_path, rounds):
    """What others have written is accepted, or refused in one line of the project's own."""
    rng = random.Random(rounds)
    entry = yaml.safe_load((Path(__file__).parents[1] / "hub_configs" / "template.yaml").read_text(encoding="utf-8"))
    options = as_recipe(parse_args(["--data-dir", "d"]))
    refused = {"config": 0, "entry": 0, "options": 0}
    said = []
    for _ in range(rounds):
        try:
            check_config(mutated(config, rng))
        except (ValueError, TypeError) as e:
            refused["config"] += 1
            said.append(str(e))
        path = tmp_path / f"{entry['architecture']}.{entry['tag']}.yaml"
        path.write_text(yaml.safe_dump(mutated(entry, rng)), encoding="utf-8")
        try:
            read_entry(path)
        except EntryError as e:
            refused["entry"] += 1
            said.append(str(e))
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(mutated(options, rng)), encoding="utf-8")
        try:
            parse_args(["-c", str(tmp_path / "args.yaml")])
        except UserError as e:
            refused["options"] += 1
            said.append(str(e))
    assert all(len(line) < 1000 and len(line.splitlines()) == 1 for line in said)
    assert all(0.2 * rounds < count < rounds for count in refused.values()), refused
    print(f"{rounds} of each, refused: {refused}")
