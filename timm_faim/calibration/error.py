"""How far confidence is from accuracy.

Shapes: N images, C classes.
"""

from torch import Tensor

from .checked import checked_rows

BINS = 15  # as in Guo et al. 2017


def reliability(confidence_N: Tensor, correct_N: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Number of images, mean confidence and accuracy (both 0..1, 0 where empty), each [bins], the latter in float64.

    Bin m of M holds the confidences in ((m - 1)/M, m/M].
    """
    confidence_N = confidence_N.double()
    bin_N = ((confidence_N * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts = bin_N.bincount(minlength=bins)
    sums = (bin_N.bincount(each.double(), minlength=bins) for each in (confidence_N, correct_N))
    confidence, accuracy = (each / counts.clamp_min(1) for each in sums)
    return counts, confidence, accuracy


def calibration_error(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in per cent (Guo et al. 2017): mean |accuracy - confidence| over bins.

    Args:
        probabilities: [N, C].
        targets: class indices [N].
        bins: of equal width.

    Raises:
        ValueError: no images, targets outside the classes, probabilities that are not finite.
    """
    best = checked_rows("probabilities", probabilities, targets).max(1)
    counts, confidence, accuracy = reliability(best.values, best.indices == targets.to(best.indices.device), bins)
    return 100.0 * (counts * (accuracy - confidence).abs()).sum().item() / len(best.values)
