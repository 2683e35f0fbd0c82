"""A classifier that follows the images which it is about to classify.

Shapes: U images, C classes, D features.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from timm_faim.adapt import ASSUMPTION, REJECTED, adapt_, evidence
from timm_faim.calibration import Calibration
from timm_faim.classifier.classifier import Classifier, ExportedModel
from timm_faim.classifier.neighbours import FILE
from timm_faim.head import FAIMHead
from timm_faim.images.checked import UNREADABLE
from timm_faim.images.files import images_of
from timm_faim.images.loaders import clean_loader
from timm_faim.run.errors import UserError

ENOUGH = 0.5  # of the images are known, or the assumption does not hold


def check_adaptable(classifier: Classifier) -> tuple[FAIMHead, Calibration, list[int]]:
    """The head, the calibration, and the training images of each class.

    Raises:
        UserError: the classifier lacks one of them, or its head cannot follow images.
    """
    if isinstance(classifier.model, ExportedModel):
        raise UserError(f"--adapt moves prototypes, and {classifier.model.file.path} is an exported file. "
                        "Give the run folder that it comes from, or leave --adapt out")  # fmt: skip
    if classifier.head is None or not classifier.head.cosine:
        raise UserError("--adapt needs a model with one FAIM head whose distance is that of cosines. Leave it out")
    if classifier.calibration is None or REJECTED not in classifier.calibration.reject:
        raise UserError("--adapt needs a calibrated model with a threshold for unknown images: one that timm-faim fit "
                        "made, or training with validation images. Leave it out")  # fmt: skip
    if classifier.images is None:
        raise UserError("--adapt needs to know how many training images each class had, and the model's config.json "
                        "does not say. Fit it again, or leave --adapt out")  # fmt: skip
    return classifier.head, classifier.calibration, classifier.images


def adapt_to_images(
    classifier: Classifier, paths: Sequence[str], batch_size: int, workers: int, state: PartialState
) -> str:
    """Move the prototypes of a classifier, in place, to where the images put them; a collective call.

    Only images that the calibration calls known count, and unless half of them are, nothing moves: there are no
    labelled images at hand that could be held out to check more.

    Returns:
        What was done, for a person.

    Raises:
        UserError: as :func:`check_adaptable`; features that are not finite.
    """
    head, calibration, images = check_adaptable(classifier)
    points = _points(classifier, paths[state.process_index :: state.num_processes], batch_size, workers)
    points = torch.cat(gather_object([points]))
    if not len(points):
        return "not adapted: no image can be read"
    adapted = copy.deepcopy(head)
    try:
        used = adapt_(adapted, _labelled(classifier, head, images), points, least=calibration.reject[REJECTED])
    except ValueError as e:
        raise UserError(f"--adapt: {e}") from e
    if used < ENOUGH * len(points):
        return f"not adapted: {used} of {len(points)} images look like one of the classes, and --adapt {ASSUMPTION}"
    with torch.no_grad():
        head.mu.copy_(adapted.mu)
    return f"adapted to {used} of {len(points)} images, unchecked, as no labels are at hand; this {ASSUMPTION}"


def _points(classifier: Classifier, paths: Sequence[str], batch_size: int, workers: int) -> Tensor:
    """Points [U, D] of the images that can be read, in half precision on the CPU."""
    found = [torch.empty(0, classifier.head.in_features, dtype=torch.float16)]
    if paths:
        pictures = images_of(paths, classifier.mode)
        for batch, numbers in clean_loader(pictures, classifier.data_config, classifier.device, batch_size, workers):
            _, points = classifier.points(batch)
            found.append(points[(numbers != UNREADABLE).to(points.device)].half().cpu())
    return torch.cat(found)


def _labelled(classifier: Classifier, head: FAIMHead, images: list[int]) -> Tensor:
    """What the labelled images of each class say [C]: of the points that the run kept, each counted for the class whose
    prototype is nearest, as nearly all training images are; without them the number of images, the most it can be."""
    if classifier.folder is not None and (Path(classifier.folder) / FILE).is_file():
        points = classifier.gallery().points_ND
        if points.shape == (sum(images), head.in_features):
            nearest = torch.cat([(z @ head.mu.float().t()).argmax(1) for z in points.split(4096)])
            return evidence(head, points, nearest)
    return torch.tensor(images, dtype=torch.float32)
