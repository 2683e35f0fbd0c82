"""Options that were removed, with the reason: command lines and recipes that still have one get a line that says so."""

from typing import Any

from timm_faim.run.errors import UserError

_METRIC = "the metric is a closed-form statistic and does not learn"
# Option: its old default, with which old runs have it on record and which did nothing; and why it is gone.
REMOVED: dict[str, tuple[Any, str]] = {
    "stages": (None, f"{_METRIC}, so a run has no stages"),
    "freeze_gamma": (False, f"{_METRIC}, so a run has no stages"),
    "contrastive_stages": (None, f"{_METRIC}, so a run has no stages; weights are those of --contrastive NAME:WEIGHT"),
    "damp_epochs": (0, f"{_METRIC}, so its 1-form needs no fading in"),
    "lr_scale_metric": (1.0, _METRIC),
    "lr_scale_lambda": (None, f"{_METRIC}; where λ learns it goes with --lr-scale-scalars"),
}


def without_removed(options: dict[str, Any], source: str) -> dict[str, Any]:
    """Options by name without the removed ones.

    Raises:
        UserError: a removed one is not at its old default.
    """
    for key, value in options.items():
        if key in REMOVED and value not in (None, REMOVED[key][0]):
            raise UserError(f"--{key.replace('_', '-')} was removed: {REMOVED[key][1]}. Leave it out{source}")
    return {key: value for key, value in options.items() if key not in REMOVED}
