"""`timm-faim`: its commands, their help, their errors, and several processes of one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from children import run_group

import timm_faim
from timm_faim.commands import COMMANDS, IN_PARALLEL, build_parser, main, run_command
from timm_faim.commands.launch import take_processes
from timm_faim.run.errors import UserError

FOLDER = Path(timm_faim.__file__).parent / "commands"
HEAVY = {"torch", "timm", "accelerate", "numpy", "PIL", "huggingface_hub"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_in_one_line_what_it_does(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    assert COMMANDS[name].split()[0] in ast.get_docstring(tree).split("\n")[0].lower()
    assert {"run"} <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], *[[name, "--help"] for name in COMMANDS]], ids=str)
def test_help_needs_no_torch(words):
    code = f"""
import sys
sys.argv = ["timm-faim", *{words!r}]
sys.orig_argv = ["python", *sys.argv]
try:
    import timm_faim
except SystemExit as e:
    assert not e.code
    heavy = {HEAVY!r} & set(sys.modules)
    print("HEAVY", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if words[:1] != ["train"]:  # its options stand where they are used
        assert done.stdout.rstrip().endswith("HEAVY []") and len(done.stdout) > 20, done.stdout


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "timm_faim", "predict", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: timm-faim predict") and not done.stderr


def test_help_of_training_has_its_name(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert not stop.value.code and capsys.readouterr().out.startswith("usage: timm-faim train")


def test_importing_the_package_never_ends_a_program_with_help_among_its_words():
    code = "import timm_faim; print(timm_faim.FAIMHead.__name__)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stdout == "FAIMHead\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predct"], "timm-faim: error: unknown command predct. Did you mean predict"),
        (["predict", "a.png"], "timm-faim predict: error: the following arguments are required: --model"),
        (["predict", "a.png", "--model", "m", "--top", "0"], "--top must be a whole number in 1..1000000, got 0"),
        (["fit", "d", "--val-fraction", "nan"], "--val-fraction must be a number > 0 and <= 0.5, got nan"),
        (["train", "--num-processes", "0"], "--num-processes must be a whole number in 1..1024, got 0"),
        (["evaluate", "hf-hub:a/b"], "timm-faim evaluate hf-hub:a/b DIR"),
    ],
)
def test_an_error_is_one_line_and_status_1(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_every_number_has_a_range(name):
    def actions(parser):
        for action in parser._actions:
            yield action
            for inner in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
                yield from actions(inner)

    assert [a.dest for a in actions(build_parser(name)) if a.type in (int, float)] == []


def test_processes_are_taken_from_anywhere_on_the_line():
    assert take_processes(["a", "--num-processes", "3", "b"]) == (3, ["a", "b"])
    assert take_processes(["--num-processes=2"]) == (2, [])
    assert take_processes(["a"]) == (1, ["a"])
    with pytest.raises(UserError, match="got nothing"):
        take_processes(["--num-processes"])


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_faim.commands.run_command", stop)
    with pytest.raises(SystemExit) as ended:
        main(["predict"])
    assert ended.value.code == 130 and capsys.readouterr().err == "timm-faim predict: stopped\n"


@pytest.mark.slow
def test_training_in_two_processes(tmp_path):
    data = runs.make_images(tmp_path / "data")
    argv = ["train", "--num-processes", "2", "--data-dir", data, "--output", tmp_path, "--experiment", "run"]
    argv += ["--model", "faim_test_resnet", *runs.TINY, "--batch-size", "2"]
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    done = run_group([sys.executable, "-m", "timm_faim", *map(str, argv)], environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout and (tmp_path / "run" / "model.safetensors").is_file()


def test_evaluate_is_the_trainings_evaluation(tmp_path, capsys):
    data = runs.make_images(tmp_path / "data")
    run = runs.train_tiny(data, tmp_path / "out")
    runs.fresh_accelerator()
    capsys.readouterr()
    words = ["--batch-size", "4", "--workers", "0", "--output", str(tmp_path)]
    run_command("evaluate", [str(run), *words, "--experiment", "a"])
    runs.fresh_accelerator()
    run_command("evaluate", [str(run), str(data / "val"), "--img-size", "32", *words, "--experiment", "b"])
    a, b = (json.loads((tmp_path / name / "eval.json").read_text())["metrics"] for name in "ab")
    assert a["samples"] == b["samples"] == 7 and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_only_commands_that_share_out_their_images_take_processes():
    assert set(IN_PARALLEL) <= set(COMMANDS)
    with pytest.raises(UserError, match="unrecognized arguments: --num-processes"):
        run_command("retrieve", ["d", "--checkpoint", "c", "--num-processes", "2"])
