"""Command line and recipes: precedence, types, and errors that name the mend."""
import pytest
import yaml

from timm_faim.training.args import as_recipe, build_parser, parse_args
from timm_faim.training.errors import UserError, did_you_mean


@pytest.fixture
def recipe(tmp_path):
    def write(**keys):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    return write


def test_command_line_wins_over_recipe_wins_over_default(recipe):
    config = recipe(data_dir="d", lr=0.5, epochs=7)
    args = parse_args(["--config", config, "--epochs", "9"])
    assert (args.epochs, args.lr, args.momentum) == (9, 0.5, 0.9)


def test_command_line_switches_off_what_the_recipe_switches_on(recipe):
    config = recipe(data_dir="d", model_ema=True, amp=True)
    args = parse_args(["-c", config, "--no-amp"])
    assert args.model_ema and not args.amp


def test_recipe_values_get_the_types_of_the_flags(recipe):
    config = recipe(data_dir="d", lr="1e-3", mean=[0.5], affine=[-10, 0.1, 0.1, 5], no_aug=True, aa=None,
                    faim_cfg={"normalize": True, "margin": 0.2, "init": "seed"}, dataset="")
    args = parse_args(["-c", config])
    assert args.lr == 0.001  # YAML 1.1 reads 1e-3 as a string
    assert args.mean == [0.5] and args.affine == [-10, 0.1, 0.1, 5] and args.no_aug and args.aa is None
    assert args.faim_cfg == {"normalize": True, "margin": 0.2, "init": "seed"}


def test_without_data_the_demo_recipe_is_used_and_flags_still_win():
    args = parse_args(["--epochs", "3"])
    assert (args.dataset, args.model, args.in_chans, args.epochs) == ("omniglot242", "faim_resnet10t", 1, 3)


@pytest.mark.parametrize("data", [["--data-dir", "d"], ["--dataset", "omniglot242"]])
def test_with_data_the_demo_recipe_is_not_used(data):
    assert parse_args(data).in_chans is None


def test_saved_options_repeat_the_run(tmp_path):
    args = parse_args(["--mixup", "0.2", "--model-kwargs", "act_layer=gelu", "--lr", "3e-4", "--amp", "--seed", "0"])
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(as_recipe(args)))
    again = parse_args(["-c", str(path)])
    again.config = args.config
    assert again == args


def test_plain_model_drops_the_head_options_of_a_recipe_but_refuses_its_own(recipe):
    config = recipe(data_dir="d", model="faim_resnet18", faim_cfg={"margin": 0.2}, head_init="data", damp_epochs=3)
    args = parse_args(["-c", config, "--model", "resnet18"])
    assert (args.faim_cfg, args.head_init, args.damp_epochs) == (None, "random", 0)
    with pytest.raises(UserError, match=r"--faim-cfg is for FAIM models.*--model faim_resnet18"):
        parse_args(["-c", config, "--model", "resnet18", "--faim-cfg", "margin=0.1"])


@pytest.mark.parametrize(("argv", "message"), [
    (["--data-dir", "d", "--epoch", "3"], r"unknown option --epoch\. Did you mean --epochs"),
    (["--data-dir", "d", "--epochs", "three"], r"--epochs.*invalid int value: 'three'"),
    (["--data-dir", "d", "--num-classes", "0"], r"--num-classes must be at least 1, got 0"),
    (["--data-dir", "d", "--num-classes", "-3"], r"--num-classes must be at least 1, got -3"),
    (["--data-dir", "d", "--batch-size", "0"], r"--batch-size must be at least 1"),
    (["--data-dir", "d", "--workers", "-1"], r"--workers must not be negative, got -1"),
    (["--data-dir", "d", "--mixup", "0.2", "-b", "7"], r"--batch-size must be even, got 7"),
    (["--data-dir", "d", "--sched", "cosin"], r"invalid choice: 'cosin'"),
    (["--config", "no/such.yaml"], r"cannot read --config no/such.yaml: No such file"),
])
def test_bad_options_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_args(argv)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("keys", "message"), [
    ({"data_dir": "d", "weight_decy": 0.1}, r"unknown key 'weight_decy' in .*recipe\.yaml\. Did you mean weight_decay"),
    ({"data_dir": "d", "weight-decay": 0.1}, r"unknown key 'weight-decay'.*weight_decay"),
    ({"data_dir": "d", "amp": "yes please"}, r"amp in .* must be true or false, got 'yes please'"),
    ({"data_dir": "d", "epochs": 2.5}, r"--epochs.*invalid int value"),
    ({"epochs": 3}, r"no data: give --data-dir or --dataset"),
])
def test_bad_recipes_name_the_key(recipe, keys, message):
    with pytest.raises(UserError, match=message):
        parse_args(["-c", recipe(**keys)])


@pytest.mark.parametrize("text", ["- a\n- b\n", "key: [unclosed"])
def test_recipe_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="bad.yaml"):
        parse_args(["-c", str(path)])


@pytest.mark.parametrize(("argv", "message"), [
    (["--faim-cfg", "normalize"], "KEY=VALUE"),
    (["--torchcompile", "inductr"], "inductr.*inductor"),
    (["--mixup", "-1"], "--mixup.*-1"),
])
def test_bad_values_are_user_errors(argv, message):
    with pytest.raises(UserError, match=message):
        parse_args(["--data-dir", "d", *argv])


def test_every_option_has_help():
    assert [a.dest for a in build_parser()._actions if not a.help] == []


def test_did_you_mean_stays_silent_when_nothing_is_near():
    assert did_you_mean("qqqq", ["epochs"]) == ""
