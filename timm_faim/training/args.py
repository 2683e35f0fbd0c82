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
from timm_faim.run.options import Flag, Parser, marked, reset, taken_from
from timm_faim.run.weights import saved_faim_cfg
from timm_faim.training.options import GROUPS, ONE_LAUNCH, Options, build_parser
from timm_faim.training.removed import REMOVED, without_removed
from timm_faim.training.rules import check_combinations, check_values, evaluator_of, without_refit

DEMO_RECIPE = Path(__file__).parents[1] / "configs" / "omniglot.yaml"
FAIM_ONLY = marked(GROUPS.values(), "faim")
WARM_UP = 5  # epochs, unless a run is no longer than that


def parse_args(argv: Sequence[str], program: str = "train_faim.py") -> Options:
    """Options from defaults, then the recipe, then the command line; the later wins.

    Without any of --config, --data-dir, --dataset and --resume PATH the bundled Omniglot recipe is the recipe. With
    --resume PATH and no --config it is the args.yaml of that run.

    Raises:
        UserError: unknown flag or key (with the nearest known one), wrong type, impossible combination.
    """
    parser = build_parser(program)
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
    flat = _parse_line(parser, [*words, *argv])
    options = Options(**{name: taken_from(group, flat) for name, group in GROUPS.items()}, config=recipe)
    options.data.data_dir = flat.data or flat.data_dir
    if skip and recipe and line.faim_cfg is None and line.faim_blocks is None:
        _keep_head_of_run(options, Path(recipe).parent)

    if not is_faim(model := options.model.model):
        given = [key for key in FAIM_ONLY if any(w.split("=")[0] == _flag(key) for w in argv)]
        if given:
            raise UserError(
                f"{_flag(given[0])} is for FAIM models, and --model {model} has no FAIM head. "
                f"Use --model faim_{model} or leave {_flag(given[0])} out"
            )
        reset(options.groups, FAIM_ONLY)
    if options.run.eval_only:
        if line.push_to_hub:
            raise UserError("--push-to-hub publishes a training. Publish a run with timm-faim hub push")
        _choose_evaluated(options, line.experiment)
    head, schedule = options.head, options.schedule
    in_line = any(word.split("=")[0] == "--head-refit" for word in argv)
    if head.head_refit == -1 or not in_line and without_refit(options):
        head.head_refit = None  # that of a recipe gives way to what it does not go with
    if (
        line.epochs != parser.get_default("epochs")
        and line.warmup_epochs is None
        and not schedule.warmup_prefix
        and (schedule.warmup_epochs or 0) >= schedule.epochs
    ):
        schedule.warmup_epochs = None  # that of a recipe gives way to a shorter run
    _complete(options)
    check_values(options)
    check_combinations(options)
    return options


def _choose_evaluated(options: Options, experiment: str) -> None:
    """--eval-only opens trained weights: of the run that --resume names, of --initial-checkpoint, or of --model.

    `experiment` is that of the command line: the run's own folder is not the evaluation's.
    """
    model, resume, options.run.experiment = options.model, options.checkpoints.resume, experiment
    model.head_init_scale, model.head_init_bias = None, None
    if resume == "auto":
        raise UserError("--eval-only with --resume auto does not say what to evaluate. Name the run folder")
    if resume:
        folder = Path(resume).absolute()
        if folder.name.startswith("checkpoint-"):
            raise UserError(
                f"--eval-only evaluates the best weights of a run, and {folder.name} holds those that "
                f"training goes on from. Name the run: --resume {folder.parents[1]}; single epochs are "
                "--initial-checkpoint files in its folder top/"
            )
        reset(options.groups, marked(options.groups, "training"))  # of the run's options only data and images matter
        reset(
            options.groups,
            ("resume", "initial_checkpoint", "pretrained_path", "faim_cfg", "faim_blocks", "model_kwargs"),
        )
        model.model = f"local-dir:{folder}"
    model.pretrained = not model.initial_checkpoint


def is_faim(model_name: str) -> bool:
    """Whether a name may have a FAIM head: a faim_ twin, or a saved model whose architecture is not known yet."""
    return model_name.startswith("faim_") or ":" in model_name


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


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


def _keep_head_of_run(options: Options, folder: Path) -> None:
    """Take the head's options from the run's config.json where this version would resolve its args.yaml to others."""
    head, model, saved = options.head, options.model, saved_faim_cfg(folder)
    if saved is None or ":" in model.model or not is_faim(model.model) or model.pretrained and may_be_converted(saved):
        return
    given = {**(head.faim_cfg or {}), **({} if head.faim_blocks is None else {"blocks": head.faim_blocks})}
    try:
        now = resolve_faim_cfg(given)
    except (ValueError, TypeError):
        return  # an error of its own, later
    if any(now[key] != saved[key] for key in now if key not in given and key != "prior"):
        head.faim_cfg, head.faim_blocks = saved, None


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
        action, flag = actions[key], _flag(key)
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{key} in {path} must be true or false, got {value!r}")
            off = [flag.replace("--", "--no-", 1)] if isinstance(action, Flag) else []
            words += [flag] if value else off
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


def _complete(options: Options) -> None:
    """Defaults that follow from other options, and one spelling of what can be said in two ways."""
    data, loss, schedule, run = options.data, options.loss, options.schedule, options.run
    if loss.smoothing is None:
        loss.smoothing = 0.0 if data.multi_label else 0.1
    if schedule.warmup_epochs is None:
        schedule.warmup_epochs = WARM_UP if schedule.epochs > WARM_UP else schedule.epochs // 2
    if run.eval_metric is None:
        run.eval_metric = "loss" if not data.val_split else evaluator_of(data).default_metric
    for group, key in (
        (options.mixing, "cutmix_minmax"),
        (options.learning, "freeze"),
        (schedule, "lr_noise"),
        (options.contrastive, "contrastive"),
    ):  # an empty list takes back what a recipe gives
        setattr(group, key, getattr(group, key) or None)
