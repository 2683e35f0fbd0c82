"""Command line and recipes: precedence, types, and errors that name the mend."""

import argparse
import re
from pathlib import Path

import pytest
import yaml
from runs import options_of, values_of

from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.options import available_cores
from timm_faim.training.args import parse_args
from timm_faim.training.loss import loss_name
from timm_faim.training.options import ONE_LAUNCH, as_recipe, build_parser
from timm_faim.training.removed import REMOVED
from timm_faim.training.resume import _changes


def flat(argv):
    return values_of(parse_args(argv))


@pytest.fixture
def recipe(tmp_path):
    def write(**keys):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    return write


def test_command_line_wins_over_recipe_wins_over_default(recipe):
    config = recipe(data_dir="d", lr=0.5, epochs=7)
    args = flat(["--config", config, "--epochs", "9"])
    assert (args.epochs, args.lr, args.momentum) == (9, 0.5, 0.9)


def test_command_line_switches_off_what_the_recipe_switches_on(recipe):
    config = recipe(data_dir="d", model_ema=True, amp=True)
    args = flat(["-c", config, "--no-amp"])
    assert args.model_ema and not args.amp


def test_recipe_values_get_the_types_of_the_flags(recipe):
    config = recipe(
        data_dir="d",
        lr="1e-3",
        mean=[0.5],
        affine=[10, 0.1, 0.1, 5],
        no_aug=True,
        aa=None,
        faim_cfg={"space": "flat", "margin": 0.2, "init": "seed"},
        dataset="",
    )
    args = flat(["-c", config])
    assert args.lr == 0.001  # YAML 1.1 reads 1e-3 as a string
    assert args.mean == [0.5] and args.affine == [10, 0.1, 0.1, 5] and args.no_aug and args.aa is None
    assert args.faim_cfg == {"space": "flat", "margin": 0.2, "init": "seed"}


def test_without_data_the_demo_recipe_is_used_and_flags_still_win():
    args = flat(["--epochs", "3"])
    assert (args.dataset, args.model, args.in_chans, args.epochs) == ("omniglot242", "faim_resnet10t", 1, 3)


@pytest.mark.parametrize("data", [["--data-dir", "d"], ["--dataset", "omniglot242"]])
def test_with_data_the_demo_recipe_is_not_used(data):
    assert parse_args(data).input.in_chans is None


def test_plain_model_drops_the_head_options_of_a_recipe_but_refuses_its_own(recipe):
    config = recipe(data_dir="d", model="faim_resnet18", faim_cfg={"margin": 0.2}, head_init="data", head_refit=3)
    args = flat(["-c", config, "--model", "resnet18"])
    assert (args.faim_cfg, args.head_init, args.head_refit) == (None, "random", None)
    with pytest.raises(UserError, match=r"--faim-cfg is for FAIM models.*--model faim_resnet18"):
        parse_args(["-c", config, "--model", "resnet18", "--faim-cfg", "margin=0.1"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data-dir", "d", "--epoch", "3"], r"unknown option --epoch\. Did you mean --epochs"),
        (["--data-dir", "d", "--epochs", "three"], r"--epochs.*whole number in 0..1000000, got three"),
        (["--data-dir", "d", "--num-classes", "0"], r"--num-classes must be a whole number in 1..10000000, got 0"),
        (["--data-dir", "d", "--num-classes", "-3"], r"--num-classes must be a whole number in 1..10000000, got -3"),
        (["--data-dir", "d", "--batch-size", "0"], r"--batch-size must be a whole number in 1"),
        (["--data-dir", "d", "--workers", "-1"], r"--workers must be .* got -1"),
        (["--data-dir", "d", "--mixup", "0.2", "-b", "7"], r"--batch-size must be even, got 7"),
        (["--data-dir", "d", "--sched", "cosin"], r"invalid choice: 'cosin'"),
        (["--config", "no/such.yaml"], r"cannot read --config no/such.yaml: No such file"),
    ],
)
def test_bad_options_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_args(argv)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"data_dir": "d", "weight_decy": 0.1},
            r"unknown key 'weight_decy' in .*recipe\.yaml\. Did you mean weight_decay",
        ),
        ({"data_dir": "d", "weight-decay": 0.1}, r"unknown key 'weight-decay'.*weight_decay"),
        ({"data_dir": "d", "amp": "yes please"}, r"amp in .* must be true or false, got 'yes please'"),
        ({"data_dir": "d", "epochs": 2.5}, r"--epochs must be a whole number"),
        ({"epochs": 3}, r"no data: give --data-dir or --dataset"),
    ],
)
def test_bad_recipes_name_the_key(recipe, keys, message):
    with pytest.raises(UserError, match=message):
        parse_args(["-c", recipe(**keys)])


@pytest.mark.parametrize("text", ["- a\n- b\n", "key: [unclosed"])
def test_recipe_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="bad.yaml"):
        parse_args(["-c", str(path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--faim-cfg", "space"], "KEY=VALUE"),
        (["--torchcompile", "inductr"], "inductr.*inductor"),
        (["--mixup", "-1"], "--mixup.*-1"),
    ],
)
def test_bad_values_are_user_errors(argv, message):
    with pytest.raises(UserError, match=message):
        parse_args(["--data-dir", "d", *argv])


def test_every_option_has_help():
    assert [a.dest for a in build_parser()._actions if not a.help] == []


@pytest.mark.parametrize(
    ("flag", "most", "has_all"), [("-h", 90, False), ("--help", 90, False), ("--help-all", 999, True)]
)
def test_help_is_short_and_all_of_it_can_be_had(capsys, flag, most, has_all):
    with pytest.raises(SystemExit) as ended:
        parse_args([flag])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and len(text.splitlines()) <= most
    assert all(name in text for name in ("DIR", "--model", "--faim-cfg", "--epochs", "--help-all"))
    assert ("--bce-sum" in text) == has_all and "default: None" not in text


def test_every_option_is_in_the_table_of_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    flags = [a.option_strings for a in build_parser()._actions if a.dest not in ("help", "data")]
    assert [names for names in flags if not any(f"`{name}" in text or f" {name}" in text for name in names)] == []


def test_did_you_mean_stays_silent_when_nothing_is_near():
    assert did_you_mean("qqqq", ["epochs"]) == ""


# Every kind of flag, none at its default: lists, dictionaries, numbers, names, both kinds of switches.
MANY = """--data-dir d --model faim_resnet18 --faim-cfg margin=0.1 init=seed --no-aug
    --lr-scale-mu 3 --lr-scale-scalars 0.5 --freeze layer1 blocks.* --val-split= --no-report --no-ddp-bb --cutmix-minmax
    0.2 0.8 --batch-size 6 --mixup-off-epoch 3 --opt-kwargs amsgrad=True --lr-noise 0.4 0.9 --lr-k-decay 2 --resume auto
    --no-resume-opt --start-epoch 1 --stop-epoch 4 --loss bce --bce-sum --bce-target-thresh 0.2 --kd-model-name x
    --task-loss-weight 0.3 --log-with tensorboard --project-name p --train-interpolation= --split-bn --resplit
    --torchcompile --torchcompile-mode reduce-overhead --model-dtype bfloat16 --eval-metric loss --gp max --fast-norm
    --pretrained-path w.pt --train-crop-mode rkrc --recovery-interval 7 --checkpoint-hist 2 --val-interval 3 --dry-run
    --remode const --decay-milestones 1 2 --sched multistep --smoothing 0.2 --drop-block 0.1 --bn-eps 1e-3
    --samples-per-class 3""".split()


@pytest.mark.parametrize(
    "argv",
    [
        MANY,
        "--data-dir d --model faim_resnet18 --contrastive infonce:0.1 triplet --views 2 "
        "--contrastive-temperature 0.05 --contrastive-margin 0.3".split(),
        ["--mixup", "0.2", "--model-kwargs", "act_layer=gelu", "--lr", "3e-4", "--amp", "--seed", "0"],
    ],
)
def test_every_option_survives_a_recipe(tmp_path, argv):
    args = parse_args(argv)
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(as_recipe(args)))
    again = parse_args(["-c", str(path)])
    again.config = args.config
    assert again == args


def test_command_line_takes_back_every_switch_and_list_of_a_recipe(tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(as_recipe(parse_args(MANY))))
    back = flat(
        [
            "-c",
            str(path),
            "--aug",
            "--ddp-bb",
            "--resume-opt",
            "--report",
            "--freeze",
            "--log-with",
            "--cutmix-minmax",
            "--mixup-off-epoch",
            "0",
            "--lr-noise",
            "--no-dry-run",
        ]
    )
    assert not (back.no_aug or back.no_ddp_bb or back.no_resume_opt or back.dry_run)
    assert back.report and back.log_with == []
    assert (back.freeze, back.cutmix_minmax, back.lr_noise) == (None, None, None)


def test_every_switch_can_be_taken_back():
    """A recipe's switches that only go one way could not be overridden."""
    for action in build_parser()._actions:
        if action.nargs == 0 and not isinstance(action, argparse._HelpAction):
            assert len(action.option_strings) == 2, action.option_strings


def test_positional_folder(recipe):
    assert flat(["d", "--epochs", "3"]).data_dir == "d"
    assert flat(["--epochs", "3", "d"]).data_dir == "d"
    # The recipe ends with a list, which must not swallow the folder.
    config = recipe(data_dir="e", mean=[0.5], std=[0.5])
    args = flat(["d", "-c", config])
    assert (args.data_dir, args.std) == ("d", [0.5])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["d", "--data-dir", "e"], "two folders of data: d and --data-dir e"),
        (["d", "e"], "cannot place 'e': one folder of data"),
    ],
)
def test_two_folders(argv, message):
    with pytest.raises(UserError, match=message):
        parse_args(argv)


@pytest.mark.parametrize("place", ["", "checkpoints/checkpoint-3"])
def test_resume_takes_the_recipe_of_the_run_without_what_belongs_to_one_launch(tmp_path, place):
    run = tmp_path / "run"
    (run / place).mkdir(parents=True)
    before = parse_args([*MANY, "--epochs", "7"])
    (run / "args.yaml").write_text(yaml.safe_dump(as_recipe(before)))
    args = flat(["--resume", str(run / place), "--workers", "1"])
    assert (args.epochs, args.freeze, args.workers, args.resume) == (7, ["layer1", "blocks.*"], 1, str(run / place))
    parser = build_parser()
    assert all(getattr(args, key) == parser.get_default(key) for key in ONE_LAUNCH if key != "resume")
    assert args.config == str(run / "args.yaml")


def test_resume_with_a_recipe_or_data_of_its_own(tmp_path, recipe):
    (tmp_path / "args.yaml").write_text("{data_dir: d, epochs: 7}")
    assert flat(["--resume", str(tmp_path), "-c", recipe(data_dir="e", epochs=9)]).epochs == 9
    assert flat(["--resume", str(tmp_path), "--data-dir", "e"]).epochs == 7
    assert flat(["--resume", str(tmp_path / "weights"), "--data-dir", "e"]).config is None
    with pytest.raises(UserError, match=r"--resume .*nowhere: no args\.yaml there"):
        parse_args(["--resume", str(tmp_path / "nowhere")])
    assert flat(["--resume", "auto"]).dataset == "omniglot242"


@pytest.mark.parametrize(
    ("argv", "smoothing", "metric", "loss"),
    [
        ([], 0.1, "top1", "ce"),
        (["--multi-label", "--dataset", "hfds/x"], 0.0, "map", "bce"),
        (["--multi-label", "--dataset", "hfds/x", "--smoothing", "0.1", "--loss", "asl"], 0.1, "map", "asl"),
        (["--val-split", ""], 0.1, "loss", "ce"),
        (["--jsd-loss", "--aug-splits", "3"], 0.1, "top1", "jsd"),
        (["--bce-loss", "--eval-metric", "top5"], 0.1, "top5", "bce"),
    ],
)
def test_defaults_that_follow_from_other_options(argv, smoothing, metric, loss):
    options = options_of(*argv)
    assert (options.loss.smoothing, options.run.eval_metric) == (smoothing, metric)
    assert loss_name(options.loss, options.data) == loss


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        # values
        ("--aug-splits 1", "--aug-splits must be 0 or at least 2, got 1"),
        ("--cutmix-minmax 0.8 0.2", r"--cutmix-minmax takes MIN < MAX in 0\.\.1, got 0\.8 0\.2"),
        ("--cutmix-minmax 0.8", r"--cutmix-minmax takes MIN < MAX"),
        ("--lr-noise 0.1 0.2 0.3", "--lr-noise takes one or two shares"),
        ("--lr-scale-mu 0", r"--lr-scale-mu must be a number > 0 and <= .* got 0"),
        ("--hflip 1.5", r"--hflip must be a number in 0\.\.1, got 1\.5"),
        ("--drop 2", r"--drop must be a number in 0\.\.1, got 2"),
        ("--model-ema-decay 2", r"--model-ema-decay must be a number in 0\.\.1"),
        ("--smoothing 1", r"--smoothing must be a number >= 0 and < 1"),
        ("--clip-grad -1", r"--clip-grad must be a number > 0"),
        ("--crop-pct 0", r"--crop-pct must be a number in"),
        ("--scale 1.5 0.1", r"--scale must be a number > 0 and <= 1, got 1\.5"),
        ("--hub-private", "--hub-private and --hub-license need --push-to-hub"),
        ("--train-last 0", "--train-last must be .* got 0"),
        ("--cache-views -1", "--cache-views must be a whole number in 0"),
        ("--start-epoch 300", "--start-epoch 300 leaves none of the 300 epochs"),
        ("--eval-metric map", "--eval-metric map is not computed. Choose one of loss, top1, top5"),
        ("--eval-metric top1 --multi-label --dataset hfds/x", "Choose one of loss, map"),
        ("--multilabel-threshold 1", "--multilabel-threshold must be a number > 0 and < 1"),
        ("--log-with tensorbord", "unknown --log-with tensorbord. Did you mean tensorboard"),
        # combinations
        ("--mixup 0.2 --aug-splits 2", "--mixup and --cutmix do not go with --aug-splits"),
        ("--cutmix-minmax 0.2 0.8 -b 7", "--batch-size must be even, got 7"),
        ("--jsd-loss", "give --aug-splits 2 or more"),
        ("--jsd-loss --mixup 0.1", "do not go with the jsd loss"),
        ("--jsd-loss --bce-loss --aug-splits 2", "--bce-loss and --jsd-loss exclude each other"),
        ("--loss ce --bce-loss", "--loss and --bce-loss exclude each other"),
        ("--aug-splits 2 --no-aug", "--aug-splits needs augmentation"),
        ("--split-bn", "--split-bn needs a split batch"),
        ("--split-bn --resplit -b 5", "--split-bn halves the batch"),
        ("--split-bn --aug-splits 2 --sync-bn", "--split-bn and --sync-bn exclude each other"),
        ("--bce-sum", "--bce-sum is an option of the bce loss"),
        ("--loss zlpr", "--loss zlpr needs --multi-label"),
        ("--loss asl --mixup 0.1", "--loss asl does not go with"),
        ("--loss twoway --multi-label --dataset hfds/x --smoothing 0.1", "--loss twoway takes targets 0 and 1"),
        ("--multi-label", "--multi-label needs a data set whose images have several labels"),
        ("--multi-label --dataset hfds/x --jsd-loss --aug-splits 2", "--multi-label does not go with the jsd loss"),
        ("--multi-label --dataset hfds/x --kd-model-name y", "--kd-model-name does not go with --multi-label"),
        ("--multi-label --dataset hfds/x --model faim_resnet18 --head-init data", "--head-init data does not go with"),
        ("--target-format multihot", "--target-format is for --multi-label"),
        ("--task-loss-weight 0.3", "--task-loss-weight needs a teacher"),
        ("--fsdp --model-ema", "--model-ema does not work under --fsdp"),
        ("--head-only --train-last 2", "--head-only and --train-last exclude each other"),
        ("--freeze a --head-only", "--freeze and --head-only exclude each other"),
        ("--cache-features", "give --head-only"),
        ("--cache-views 2", "--cache-views needs --cache-features"),
        ("--cache-features --head-only --mixup 0.1", "--cache-features does not go with --mixup and --cutmix"),
        ("--cache-features --head-only --kd-model-name x", "--cache-features does not go with --kd-model-name"),
        ("--cache-features --head-only --val-flip", "--cache-features does not go with --val-flip"),
        ("--cache-features --head-only --dataset wds/", "--cache-features does not go with --dataset wds/"),
        ("--amp --model-dtype bfloat16", "--amp needs weights in float32"),
        ("--torchcompile-mode default", "--torchcompile-mode needs --torchcompile"),
        ("--val-split= --eval-only", "--eval-only needs validation data"),
        ("--val-split= --sched plateau", "--sched plateau follows the validation"),
        ("--mixup-off-epoch 3", "--mixup-off-epoch needs --mixup or --cutmix"),
        ("--epoch-repeats 2", "--epoch-repeats is for hfids/ and tfds/ data"),
        ("--train-num-samples 5 --dataset hfds/x", "are for streamed data"),
        ("--target-key x", "--input-key and --target-key are for"),
        ("--aug-repeats 3 --dataset wds/", "--aug-repeats does not go with streamed data"),
        ("--aug-splits 2 --dataset hfids/x", "--aug-splits does not go with streamed data"),
        ("--wandb-project p", "--wandb-project needs --log-wandb"),
        ("--views 2 --aug-splits 2", "--views and --aug-splits exclude each other"),
        ("--views 2 --mixup 0.2", "--views does not go with --mixup and --cutmix"),
        ("--samples-per-class 2 --dataset wds/", "--samples-per-class does not go with streamed data"),
        ("--samples-per-class 2 --multi-label --dataset hfds/x", "--samples-per-class does not go with --multi-label"),
        ("--samples-per-class 2 --aug-repeats 3", "--samples-per-class and --aug-repeats exclude each other"),
        (
            "--contrastive supcon",
            "needs several images of a class in a batch: give --samples-per-class 4, or --views 2",
        ),
        ("--contrastive supcon --views 2 --kd-model-name x", "--contrastive does not go with --kd-model-name"),
        (
            "--contrastive supcon --samples-per-class 2 --mixup 0.2",
            "--contrastive does not go with --mixup and --cutmix",
        ),
        ("--contrastive supcon --views 2 --fsdp", "--contrastive does not go with --fsdp"),
        ("--contrastive suppcon --views 2", "Did you mean supcon"),
        ("--views 0", "--views must be a whole number in 1"),
        ("--contrastive-temperature 0", "--contrastive-temperature must be a number > 0"),
        ("--contrastive-margin -1", "--contrastive-margin must be a number > 0"),
    ],
)
def test_options_that_do_not_go(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_args(["--data-dir", "d", "--model", "faim_resnet18", *argv.split()])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "flag", ["--lr-scale-scalars 2", "--head-init data", "--contrastive supcon", "--faim-blocks 2"]
)
def test_options_of_faim_models_on_a_plain_one(recipe, flag):
    with pytest.raises(UserError, match=f"{flag.split()[0]} is for FAIM models"):
        parse_args(["--data-dir", "d", "--model", "resnet18", *flag.split()])
    config = recipe(data_dir="d", model="faim_resnet18", lr_scale_scalars=3.0, lr_scale_mu=2.0)
    args = flat(["-c", config, "--model", "resnet18"])
    assert (args.lr_scale_scalars, args.lr_scale_mu) == (1.0, 2.0)


# Removed options, each as a flag and as what an old recipe may say.
GONE = {
    "--stages 1 2": {"stages": [1.0, 2.0]},
    "--freeze-gamma": {"freeze_gamma": True},
    "--damp-epochs 1": {"damp_epochs": 1},
    "--lr-scale-metric=2": {"lr_scale_metric": 2.0},
    "--lr-scale-lambda 2": {"lr_scale_lambda": 2.0},
    "--contrastive-stages 0 1 1": {"contrastive_stages": [0.0, 1.0, 1.0]},
}
OLD_DEFAULTS = {"freeze_gamma": False, "damp_epochs": 0, "lr_scale_metric": 1.0, "stages": None}


@pytest.mark.parametrize("flag", GONE)
def test_removed_options_say_why(recipe, tmp_path, flag):
    message = f"{re.split('[ =]', flag)[0]} was removed: the metric is a closed-form statistic"
    with pytest.raises(UserError, match=f"{message}.* Leave it out$"):
        parse_args(["d", *flag.split()])
    with pytest.raises(UserError, match=rf"{message}.* Leave it out of .*\.yaml$"):
        parse_args(["-c", recipe(data_dir="d", **GONE[flag])])
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({"data_dir": "d", **GONE[flag]}))
    with pytest.raises(UserError, match=message):
        parse_args(["--resume", str(tmp_path)])
    assert flat(["--eval-only", "--resume", str(tmp_path)]).eval_only  # of an old run only the weights count


def test_removed_options_at_their_old_defaults_do_nothing(tmp_path):
    assert OLD_DEFAULTS.keys() <= REMOVED.keys()
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({"data_dir": "d", "epochs": 7, **OLD_DEFAULTS}))
    args = flat(["--resume", str(tmp_path)])
    assert args.epochs == 7 and not REMOVED.keys() & vars(args).keys()
    assert _changes(tmp_path, {"data_dir": "d", "epochs": 7}) == {}


def test_defaults_and_types_are_timms():
    """Flags that timm_faim shares with timm's train.py keep its defaults; docs/training.md names the exceptions."""
    expected = dict(
        train_split="train",
        val_split="validation",
        batch_size=128,
        opt="sgd",
        momentum=0.9,
        weight_decay=2e-5,
        sched="cosine",
        lr_base=0.1,
        lr_base_size=256,
        warmup_lr=1e-5,
        min_lr=0.0,
        epochs=300,
        warmup_epochs=5,
        lr_noise_pct=0.67,
        lr_cycle_decay=0.5,
        lr_cycle_limit=1,
        decay_rate=0.1,
        hflip=0.5,
        color_jitter=0.4,
        reprob=0.0,
        remode="pixel",
        recount=1,
        smoothing=0.1,
        train_interpolation="random",
        dist_bn="reduce",
        model_ema_decay=0.9998,
        seed=42,
        log_interval=50,
        val_interval=1,
        checkpoint_hist=10,
        workers=min(4, available_cores()),
        kd_temperature=4.0,
        kd_distill_type="logit",
        mixup_prob=1.0,
        mixup_switch_prob=0.5,
        clip_mode="norm",
        eval_metric="top1",
        aug_splits=0,
        epoch_repeats=0.0,
        layer_decay_min_scale=0.0,
        amp_dtype="float16",
    )
    args = vars(flat(["d"]))
    assert {key: args[key] for key in expected} == expected
