"""The habits that reach into a head, on one architecture of each model file of timm; by hand: ``pytest --slow``."""

import pytest
import test_accelerate
import test_pytorch
import test_timm
import test_transformers
import test_transforms
from habits import Case, parity
from test_architectures import SMALL

HABITS = [
    getattr(module, name)
    for module, names in {
        test_timm: "reset_to_other_classes graph_extractor",
        test_pytorch: "state_dict_by_file pickled empty_then_loaded meta_assigned_then_moved replicas "
        "parameters_of_each_module_only_in_its_forward",
        test_transforms: "called_with_parameters torchvision_extractor",
        test_accelerate: "offloaded_to_memory empty_then_loaded_to_disk",
        test_transformers: "opened opened_with_other_labels",
    }.items()
    for name in names.split()
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
@pytest.mark.parametrize("arch", SMALL)
def test_habit(habit, arch, tmp_path):
    needs_folder = habit.__code__.co_argcount == 2
    parity(habit, Case(arch, "default"), {}, tmp_path if needs_folder else None)
