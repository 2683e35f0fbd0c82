"""Every number of the command line and of recipes has a range, stated where the option is declared."""

import math
import random

import pytest
import torch
import yaml
from runs import TINY, make_images, options_of, train, values_of

from timm_faim.commands import build_parser as command_parser
from timm_faim.run.errors import UserError
from timm_faim.run.options import Number
from timm_faim.run.weights import saved_faim_cfg
from timm_faim.training.args import parse_args
from timm_faim.training.optimiser import build_scheduler
from timm_faim.training.options import build_parser

NUMERIC = [action for action in build_parser()._actions if isinstance(action.type, Number)]
WORDS = ["nan", "inf", "-inf", "-1", "0", "1", "1e308", "-1e-30", "4294967296", "1e400", "text", "", "0x10", "1_0", "½"]


def flag(action):
    return next(name for name in action.option_strings if name.startswith("--"))


def test_every_number_has_a_range():
    assert [a.dest for a in build_parser()._actions if a.type in (int, float)] == []
    assert len(NUMERIC) > 90
    for action in NUMERIC:
        assert math.isfinite(action.type.least) and math.isfinite(action.type.most)
        for value in action.default if isinstance(action.default, list) else [action.default]:
            assert value is None or action.type(str(value)) == value, action.dest
    text = " ".join(build_parser().format_help().split())
    assert "[a whole number in 0..2147483647]" in text


@pytest.mark.parametrize(
    "line",
    [
        "--seed -1",
        "--seed 4294967296",
        "--crop-pct 100",
        "--crop-pct 1e-9",
        "--affine nan 0 0 0",
        "--affine 0 0 0 inf",
        "--in-chans 100",
        "--decay-epochs 0 --sched step",
        "--cpu-threads 100000",
        "--img-size 1000000",
        "--views 10000",
        "--min-lr nan",
        "--weight-decay -1",
        "--warmup-lr nan",
        "--lr-noise nan nan",
        "--decay-rate nan",
        "--layer-decay nan",
        "--layer-decay 0",
        "--color-jitter nan",
        "--ratio 0 0",
        "--input-size 3 0 8",
        "--std 0 0 0",
        "--affine 10 2 0 0",
        "--affine 10 0 1 0",
        "--affine 10 0 0 90",
        "--lr-noise 0.9 0.1",
        "--decay-milestones 20 10",
        "--lr-noise-pct 0",
        "--lr-cycle-mul 1e-300",
        "--scale 0.9 0.1",
        "--ratio 2 1",
        "--in-chans 2",
        "--input-size 4 8 8",
        "--input-img-mode F",
    ],
)
def test_numbers_that_made_tracebacks_hangs_or_nothing(line):
    words = line.split()
    with pytest.raises(UserError) as caught:
        parse_args(["--data-dir", "d", *words])
    message = str(caught.value)
    assert words[0] in message and "\n" not in message and len(message) < 300
    assert any(word in message for word in words[1:])


def test_a_range_holds_for_recipes_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    for key, value in (("weight_decay", -1), ("warmup_lr", math.nan), ("mean", [0.5, math.inf]), ("seed", 2**40)):
        path.write_text(yaml.safe_dump({"data_dir": "d", key: value}))
        with pytest.raises(UserError, match=f"--{key.replace('_', '-')} must be a .*number in"):
            parse_args(["-c", str(path)])


@pytest.mark.parametrize(
    "content",
    [
        {"opt_betas": [0.9, "--push-to-hub=a/b"]},
        {"log_with": ["--push-to-hub=a/b"]},
        {"freeze": ["-b", "7"]},
        {"opt_kwargs": {"--push-to-hub": "a/b"}},
        {"log_with": ["tensorboard", "--hub-license=mit"]},
    ],
)
def test_values_of_a_recipe_are_no_flags(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data_dir": "d", **content}))
    with pytest.raises(UserError, match=r"must not begin with a dash|must be a number"):
        parse_args(["-c", str(path)])


@pytest.mark.parametrize("word", ["-1e-3", "-inf", "-nan", "-.5", "-1e400"])
def test_negative_numbers_are_values_in_any_notation(word):
    with pytest.raises(UserError, match=rf"--lr must be a number in 0\.\.1000, got {word}"):
        parse_args(["--data-dir", "d", "--lr", word])
    assert options_of("--model", "resnet18", "--head-init-bias", "-1e-3").model.head_init_bias == -1e-3


def test_negative_numbers_in_a_recipe_are_values(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data_dir": "d", "head_init_bias": -2.5, "model_kwargs": {"depth": -1}}))
    assert values_of(parse_args(["-c", str(path), "--model", "resnet18"])).head_init_bias == -2.5


@pytest.mark.parametrize("rounds", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_fuzz_of_numeric_flags(rounds):
    """A value is accepted and within its range, or there is one line that names the option."""
    rng = random.Random(rounds)
    tried = refused = 0
    for action in NUMERIC:
        for _ in range(3 * rounds):
            count = action.nargs if isinstance(action.nargs, int) else 1
            if rng.random() < 0.15:
                count += rng.choice([-1, 1])
            words = [rng.choice([*WORDS, str(rng.uniform(-2, 2)), str(rng.randrange(-9, 99))]) for _ in range(count)]
            tried += 1
            try:
                args = parse_args(["--data-dir", "d", flag(action), *words])
            except UserError as e:
                refused += 1
                assert "\n" not in str(e) and len(str(e)) < 400
            else:
                value = getattr(values_of(args), action.dest)
                for number in value if isinstance(value, list) else [value]:
                    assert number is None or action.type.least <= number <= action.type.most, (action.dest, words)
    assert 0.3 * tried < refused < tried
    print(f"{tried} command lines, {refused} refused")


def test_a_warm_up_leaves_epochs_at_the_full_rate():
    def of(*words):
        return options_of(*words).schedule.warmup_epochs

    assert of() == of("--epochs", "6") == 5 and of("--epochs", "5") == 2 and of("--epochs", "1") == 0
    assert of("--epochs", "2", "--warmup-epochs", "5", "--warmup-prefix") == 5
    assert of("--epochs", "2", "--warmup-epochs", "5", "--sched", "none") == 5
    for warm_up in ("2", "5"):
        with pytest.raises(UserError, match=rf"--warmup-epochs {warm_up} leaves none of the 2 epochs .* at most 1"):
            of("--epochs", "2", "--warmup-epochs", warm_up)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    images = make_images(folder / "images")
    options = ["--data-dir", images, "--model", "faim_test_resnet", *TINY, "--output", folder]
    train(*options, "--experiment", "run", "--stop-epoch", "1", "--faim-cfg", "margin=0.3", "preset=flat")
    recipe = yaml.safe_load((folder / "run" / "args.yaml").read_text())
    recipe["faim_cfg"] = {"margin": 0.3}  # as before there were recipes, when "plain" was what there was
    (folder / "run" / "args.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "run", options


def test_a_run_goes_on_with_the_head_that_it_was_made_with(run, capsys):
    folder, _ = run
    head = parse_args(["--resume", str(folder)]).head
    assert head.faim_cfg["preset"] == "flat" and head.faim_cfg["margin"] == 0.3
    assert head.faim_cfg == saved_faim_cfg(folder)
    assert values_of(parse_args(["--resume", str(folder), "--faim-cfg", "margin=0.1"])).faim_cfg == {"margin": 0.1}


def test_options_that_make_another_head_do_not_go_on_with_a_run(run):
    folder, options = run
    with pytest.raises(UserError, match=r"made with a head of preset='flat' .*Go on with --resume"):
        train(*options, "--resume", folder, "--faim-cfg", "margin=0.3")


@pytest.mark.parametrize(
    "line",
    [
        "--lr-cycle-mul 10 --lr-cycle-limit 1000",
        "--lr-cycle-mul 0.5 --lr-cycle-limit 3 --cooldown-epochs 4 --epochs 6",
        "--sched step --decay-epochs 0.001 --decay-rate 100",
        "--sched tanh --lr-cycle-mul 100 --lr-cycle-limit 900",
    ],
)
def test_schedules_without_rates_are_one_line(line):
    args = parse_args(["--data-dir", "d", "--warmup-epochs", "0", *line.split()])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    try:
        _, epochs = build_scheduler(args.schedule, args.run, optimizer, updates=4)
    except UserError as e:
        assert "--sched" in str(e) and "\n" not in str(e)
    else:
        assert epochs > 0


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau",
                                   "none"])  # fmt: skip
def test_usual_schedules_have_rates(sched):
    args = parse_args(["--data-dir", "d", "--sched", sched, "--epochs", "100", "--decay-epochs", "30", "--lr-noise",
                       "0.4", "0.9"])  # fmt: skip
    build_scheduler(args.schedule, args.run, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), updates=4)


def test_a_recipes_warm_up_gives_way_to_a_shorter_run():
    assert [parse_args(["--epochs", count]).schedule.warmup_epochs for count in "12"] == [0, 1]
    with pytest.raises(UserError, match="leaves none"):
        parse_args(["--epochs", "2", "--warmup-epochs", "2"])


def test_retrieval_has_ranges_too():
    for action in command_parser("retrieve")._actions:
        assert action.type not in (int, float), action.dest
    for words in (["--seed", "-1"], ["--sheet-rows", "1000000"], ["--workers", "100000"], ["--batch-size", "nan"]):
        with pytest.raises(UserError, match=rf"{words[0]} must be a whole number in .*, got {words[1]}"):
            command_parser("retrieve").parse_args(["d", "--model", "x", *words])
