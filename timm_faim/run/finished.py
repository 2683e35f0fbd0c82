"""What is done of a run after its last epoch, on record in its folder, so that a resumed run does only what is left."""

import json
from dataclasses import dataclass
from pathlib import Path

from timm_faim.documents import read_json
from timm_faim.run.files import atomic_write
from timm_faim.run.options import flag, option

FINISHED = ".finished"
CALIBRATION, REPORT = "calibration", "report"


@dataclass
class FinishOptions:
    """Calibration, report and publication."""

    calibrate: bool = flag(
        "set the temperature γ of the best weights, and thresholds for unknown images, from the validation images",
        True,
        marks="runtime faim",
    )
    report: bool = flag("write an HTML page about the run", True, marks="runtime")
    push_to_hub: str = option(
        "publish the finished run on the Hugging Face Hub", "", metavar="ORG/NAME", marks="usual training runtime"
    )
    hub_private: bool = flag("with --push-to-hub: make a private repository", marks="training runtime")
    hub_license: str | None = option(
        "with --push-to-hub: licence of the weights, for example apache-2.0", metavar="ID", marks="training runtime"
    )


def push_to(repo: str) -> str:
    """Name of the work of publishing to a repository."""
    return f"push to {repo}"


def work_left(options: FinishOptions, folder: Path, epochs: int) -> list[str]:
    """What is asked for after `epochs` epochs and not done: CALIBRATION, REPORT, `push_to(...)`, in this order."""
    asked = {
        CALIBRATION: options.calibrate,
        REPORT: options.report,
        push_to(options.push_to_hub): bool(options.push_to_hub),
    }
    done = _read(folder, epochs)
    return [work for work, is_asked in asked.items() if is_asked and work not in done]


def record_done(folder: Path, epochs: int, *work: str) -> None:
    """Put on record that the run has its `epochs` epochs, and what else is done since."""
    done = [*_read(folder, epochs), *work]
    with atomic_write(folder / FINISHED) as temporary:
        temporary.write_text(json.dumps({"epochs": epochs, "done": done}) + "\n", encoding="utf-8")


def forget_done(folder: Path) -> None:
    """The run trains on: what was done is of other weights."""
    (folder / FINISHED).unlink(missing_ok=True)


def _read(folder: Path, epochs: int) -> list[str]:
    try:
        record = read_json(folder / FINISHED)
        return list(record["done"]) if record["epochs"] == epochs else []
    except (OSError, ValueError, KeyError, TypeError):  # none, or not a record: then nothing is known to be done
        return []
