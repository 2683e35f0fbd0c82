"""A calibration in a run folder: γ of the heads in the weights, thresholds in the record."""

from pathlib import Path

import timm
from safetensors.torch import save_file

from timm_faim.calibration import Calibration, apply_temperature_
from timm_faim.run.files import atomic_write, link_as
from timm_faim.run.record import write_record
from timm_faim.run.weights import BEST, CONFIG, TIMM_NAME, whole_tensors


def save_calibration(folder: Path, calibration: Calibration) -> None:
    """Divide the logits of the best weights by the temperature, and put the thresholds on record.

    The logits of the weights are those that the calibration was made of; other weights of the run stay as they are.
    """
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    apply_temperature_(model, calibration.temperature)
    with atomic_write(folder / BEST) as temporary:
        save_file(whole_tensors(model.state_dict()), temporary, metadata={"format": "pt"})
    link_as(folder / BEST, folder / TIMM_NAME)
    write_record(folder / CONFIG, calibration=calibration.to_json())


def calibration_line(calibration: Calibration) -> str:
    """What a calibration has done, for a person."""
    after = "" if calibration.ece_after is None else f", {calibration.ece_after:.1f} % after (one half on the other)"
    source = "validation images" if calibration.source == "validation" else calibration.source
    return (
        f"calibrated on {calibration.images} {source}: temperature {calibration.temperature:.3g}, calibration error "
        f"{calibration.ece_before:.1f} % before{after}"
    )
