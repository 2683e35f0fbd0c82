"""What Accelerate does with a model: empty starts, offloading, preparing, saving."""

import copy

import accelerate
import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model, init_empty_weights
from accelerate import load_checkpoint_and_dispatch as load_and_dispatch
from habits import cases, heads, listed, parity, step


def saved(case, folder, model):
    torch.save(model.state_dict(), folder / "model.bin")
    return str(folder / "model.bin")


def empty_then_dispatched(case, folder):
    model = case.make()
    with init_empty_weights():
        other = case.make()
    assert all(p.is_meta for p in other.parameters())
    case.same(load_and_dispatch(other, saved(case, folder, model), device_map={"": "cpu"}), model)


def empty_with_buffers_then_dispatched(case, folder):
    model = case.make()
    with init_empty_weights(include_buffers=True):
        other = case.make()
    case.same(load_and_dispatch(other, saved(case, folder, model), device_map={"": "cpu"}), model)


def empty_then_mapped_by_size(case, folder):
    model = case.make()
    with init_empty_weights():
        other = case.make()
    size = accelerate.utils.compute_module_sizes(other)[""]
    device_map = accelerate.infer_auto_device_map(other, max_memory={"cpu": 3 * size})
    case.same(load_and_dispatch(other, saved(case, folder, model), device_map=device_map), model)


def empty_then_loaded_to_disk(case, folder):
    model = case.make()
    with init_empty_weights():
        other = case.make()
    device_map = {name: "disk" for name, _ in other.named_children()}
    device_map |= {name: "cpu" for name, _ in other.named_parameters(recurse=False)}
    device_map |= {name: "cpu" for name, _ in other.named_buffers(recurse=False)}
    loaded = load_and_dispatch(other, saved(case, folder, model), device_map=device_map, offload_folder=folder / "off")
    case.same(loaded, model)


def offloaded_to_memory(case, folder):
    model = case.make()
    case.same(cpu_offload(copy.deepcopy(model), "cpu"), model)


def offloaded_with_buffers(case, folder):
    model = case.make()
    case.same(cpu_offload(copy.deepcopy(model), "cpu", offload_buffers=True), model)


def offloaded_to_disk(case, folder):
    model = case.make()
    case.same(disk_offload(copy.deepcopy(model), folder / "off", "cpu"), model)


def dispatched_by_part(case, folder):
    model = case.make()
    device_map = {name: "cpu" for name, _ in model.named_children()}
    device_map |= {name: "cpu" for name, _ in model.named_parameters(recurse=False)}
    device_map |= {name: "cpu" for name, _ in model.named_buffers(recurse=False)}
    device_map[heads(model)[0][0].partition(".")[0]] = "disk"
    case.same(
        dispatch_model(
            copy.deepcopy(model), device_map, main_device="cpu", offload_dir=folder / "off", force_hooks=True
        ),
        model,
    )


def prepared_saved_and_resumed(case, folder):
    accelerator = Accelerator(cpu=True)
    model = case.make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    step(model, case.x())
    accelerator.save_state(folder / "state")
    wanted = model(case.x())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(folder / "state")
    case.same(model, wanted)
    case.same(copy.deepcopy(accelerator.unwrap_model(model)), wanted)
    accelerator.save_model(model, folder / "sharded", max_shard_size="100KB")
    other = case.make()
    accelerate.load_checkpoint_in_model(other, folder / "sharded", strict=True)
    case.same(other, wanted)


def trained_in_bfloat16(case, folder):
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(case.make())
        step(model, case.x())
        assert model(case.x()).dtype == torch.float32
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


HABITS = listed(globals(), __name__, ("case", "folder"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("habit", "case"), cases(HABITS, heavy=("prepared_saved_and_resumed",)))
def test_habit(habit, case, tmp_path):
    parity(habit, case, {}, tmp_path)
