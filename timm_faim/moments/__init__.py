"""Second moments of middle feature maps, as features for a head."""

from .moments import Moments
from .root import matrix_root

__all__ = ["Moments", "matrix_root"]
