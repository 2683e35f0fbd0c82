"""The command line: defaults, then a YAML recipe, then flags, and the checks between options.

A recipe is turned into command-line words and put in front of the real ones, so that it goes through the same
type and choice checks and the command line wins because it comes last.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_faim.documents import read_yaml
from timm_faim.models import may_be_converted
from timm_faim.models.config import resolve_faim_cfg
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.parser import Parser, switch
from timm_faim.run.weights import saved_faim_cfg
from timm_faim.training.flags import FAIM_ONLY, ONE_LAUNCH, TRAINING_ONLY, build_parser
from timm_faim.training.removed import REMOVED, without_removed
from timm_faim.training.rules import check_combinations, check_values, evaluator_of, flag_of, is_faim, without_refit

DEMO_RECIPE = Path(__file__).parents[1] / "configs" / "omniglot.yaml"
WARM_UP = 5  # epochs, unless a run is no longer than that


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Options from defaults, then the recipe, then the command line; the later wins.

    Without any of --config, --data-dir, --dataset and --resume PATH the bundled Omniglot recipe is the recipe. With
    --resume PATH and no --config it is the args.yaml of that run.

    Raises:
        UserError: unknown flag or key (with the nearest known one), wrong type, impossible combination.
    """
    parser = build_parser()
    line = _parse_line(parser, argv)
    if line.data and line.data_dir:
        raise UserError(f"two folders of data: {line.data} and --data-dir {line.data_dir}. Give one of them")
    recipe, skip, has_data = line.config, (), bool(line.data or line.data_dir or line.dataset)
    if not recipe and line.resume not in ("", "auto"):
        recipe, skip = _recipe_of_run(line.resume, has_data), (*ONE_LAUNCH, *(REMOVED if line.eval_only else ()))
    elif not (recipe or has_data):
        recipe = str(DEMO_RECIPE)
    # The last word keeps a positional DIR from becoming a value of the recipe's last list.
    words = [*_recipe_words(parser, Path(recipe), skip), f"--config={recipe}"] if recipe else []
    args = _parse_line(parser, [*words, *argv])
    args.config, args.data_dir = recipe, args.data or args.data_dir
    if skip and recipe and line.faim_cfg is None and line.faim_blocks is None:
        _keep_head_of_run(args, Path(recipe).parent)
    del args.data

    if not is_faim(args.model):
        given = [key for key in FAIM_ONLY if any(w.split("=")[0] == flag_of(key) for w in argv)]
        if given:
            raise UserError(
                f"{flag_of(given[0])} is for FAIM models, and --model {args.model} has no FAIM head. "
                f"Use --model faim_{args.model} or leave {flag_of(given[0])} out"
            )
        for key in FAIM_ONLY:
            setattr(args, key, parser.get_default(key))
    if args.eval_only:
        if line.push_to_hub:
            raise UserError("--push-to-hub publishes a training. Publish a run with python -m timm_faim.hub push")
        _choose_evaluated(parser, args, line.experiment)
    in_line = any(word.split("=")[0] == "--head-refit" for word in argv)
    if args.head_refit == -1 or not in_line and without_refit(args):
        args.head_refit = None  # that of a recipe gives way to what it does not go with
    if (
        line.epochs != parser.get_default("epochs")
        and line.warmup_epochs is None
        and not args.warmup_prefix
        and (args.warmup_epochs or 0) >= args.epochs
    ):
        args.warmup_epochs = None  # that of a recipe gives way to a shorter run
    _complete(args)
    check_values(args)
    check_combinations(args)
    return args


def _choose_evaluated(parser: Parser, args: argparse.Namespace, experiment: str) -> None:
    """--eval-only opens trained weights: of the run that --resume names, of --initial-checkpoint, or of --model.

    `experiment` is that of the command line: the run's own folder is not the evaluation's.
    """
    args.experiment, args.head_init_scale, args.head_init_bias = experiment, None, None
    if args.resume == "auto":
        raise UserError("--eval-only with --resume auto does not say what to evaluate. Name the run folder")
    if args.resume:
        folder = Path(args.resume).absolute()
        if folder.name.startswith("checkpoint-"):
            raise UserError(
                f"--eval-only evaluates the best weights of a run, and {folder.name} holds those that "
                f"training goes on from. Name the run: --resume {folder.parents[1]}; single epochs are "
                "--initial-checkpoint files in its folder top/"
            )
        for action in parser._actions:  # of the run's options only those of data and images matter
            if action.dest in TRAINING_ONLY:
                setattr(args, action.dest, action.default)
        args.model, args.resume, args.initial_checkpoint, args.pretrained_path = f"local-dir:{folder}", "", "", None
        args.faim_cfg, args.faim_blocks, args.model_kwargs = None, None, {}
    args.pretrained = not args.initial_checkpoint


def as_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The options as a recipe that repeats the run (without the ones that are unset)."""
    return {key: value for key, value in vars(args).items() if value is not None and key != "config"}


def _parse_line(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    without_removed(
        {
            word.split("=")[0].replace("--no-", "--")[2:].replace("-", "_"): word
            for word in words
            if word.startswith("--")
        },
        "",
    )
    try:
        args, unknown = parser.parse_known_args(words)
    except ValueError as e:  # ParseKwargs splits at the first =
        raise UserError("--faim-cfg, --model-kwargs and --opt-kwargs take KEY=VALUE, for example margin=0.2") from e
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = next((word for word in unknown if word.startswith("-")), None)
        if word is None:
            raise UserError(f"cannot place {unknown[0]!r}: one folder of data is expected, or a flag (--help)")
        raise UserError(f"unknown option {word}.{did_you_mean(word.split('=')[0], flags)}")
    return args


def _recipe_of_run(resume: str, has_data: bool) -> str | None:
    """args.yaml of the run folder that --resume names, directly or by one of its checkpoints."""
    folder = Path(resume)
    for path in (folder, *folder.absolute().parents[:2]) if folder.name.startswith("checkpoint-") else (folder,):
        if (path / "args.yaml").is_file():
            return str(path / "args.yaml")
    if has_data:
        return None
    raise UserError(
        f"--resume {resume}: no args.yaml there. Name a run folder or a checkpoint in it, or say how "
        "to train with --config or --data-dir"
    )


def _keep_head_of_run(args: argparse.Namespace, folder: Path) -> None:
    """Take the head's options from the run's config.json where this version would resolve its args.yaml to others."""
    saved = saved_faim_cfg(folder)
    if saved is None or ":" in args.model or not is_faim(args.model) or args.pretrained and may_be_converted(saved):
        return
    given = {**(args.faim_cfg or {}), **({} if args.faim_blocks is None else {"blocks": args.faim_blocks})}
    try:
        now = resolve_faim_cfg(given)
    except (ValueError, TypeError):
        return  # an error of its own, later
    if any(now[key] != saved[key] for key in now if key not in given and key != "prior"):
        args.faim_cfg, args.faim_blocks = saved, None


def _recipe_words(parser: Parser, path: Path, skip: Sequence[str] = ()) -> list[str]:
    """Command-line words that say what the recipe says, without the keys in `skip`."""
    try:
        recipe = read_yaml(path)
    except OSError as e:
        raise UserError(f"cannot read --config {path}: {e.strerror}. Give the path of a YAML file") from e
    except ValueError as e:
        raise UserError(f"--config {path} is not valid YAML: {e}") from e
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} must hold `key: value` lines, got {type(recipe).__name__}")

    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "help_all", "config")}
    words: list[str] = []
    recipe = without_removed({key: value for key, value in recipe.items() if key not in skip}, f" of {path}")
    for key, value in recipe.items():
        if key not in actions:
            raise UserError(f"unknown key {key!r} in {path}.{did_you_mean(str(key), actions)}")
        if value is None:
            continue
        action, flag = actions[key], flag_of(key)
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{key} in {path} must be true or false, got {value!r}")
            word = switch(action, value)
            words += [word] if word else []
        elif isinstance(value, dict):
            words += [flag, *(_value_word(key, f"{k}={v!r}", path) for k, v in value.items())]
        elif isinstance(value, list):
            words += [flag, *(_value_word(key, item, path) for item in value)]
        else:
            words.append(f"{flag}={value}")  # one word: an empty or negative value stays a value
    return words


def _value_word(key: str, item: Any, path: Path) -> str:
    """An item of a list as a word that cannot be read as a flag."""
    word = str(item)
    if word.startswith("-") and not isinstance(item, (int, float)):
        raise UserError(f"{key} in {path} holds {word!r}; items of a list must not begin with a dash")
    return word


def _complete(args: argparse.Namespace) -> None:
    """Defaults that follow from other options, and one spelling of what can be said in two ways."""
    if args.smoothing is None:
        args.smoothing = 0.0 if args.multi_label else 0.1
    if args.warmup_epochs is None:
        args.warmup_epochs = WARM_UP if args.epochs > WARM_UP else args.epochs // 2
    if args.eval_metric is None:
        args.eval_metric = "loss" if not args.val_split else evaluator_of(args).default_metric
    for key in ("cutmix_minmax", "freeze", "lr_noise", "contrastive"):  # an empty list takes back what a recipe gives
        setattr(args, key, getattr(args, key) or None)
