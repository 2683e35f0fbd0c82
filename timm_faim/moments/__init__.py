"""Second moments of middle feature maps, as features for a head."""

from .moments import MapStatistics, Moments
from .root import matrix_root

__all__ = ["MapStatistics", "Moments", "matrix_root"]
