"""Classes of a FAIM model without training: added from a few images, removed, merged and renamed, in place."""

from .change import add_classes, merge_classes, remove_classes, rename_classes
from .names import class_names

__all__ = ["add_classes", "class_names", "merge_classes", "remove_classes", "rename_classes"]
