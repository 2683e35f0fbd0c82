"""Exported files: what they compute is what the model does, what they say of it, and that none is half or wrong."""

import json

import pytest
import timm
import torch
from runs import make_images
from torch import nn

from timm_faim import FoldedHead, fit_, save_model
from timm_faim.commands import main
from timm_faim.export import Exported, ParityError, export_model, fold_heads, packages
from timm_faim.export.program import Program, data_config_of, normalised, pixels_of
from timm_faim.export.samples import read_samples
from timm_faim.export.write import TOLERANCE
from timm_faim.run.errors import UserError

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".ts"}
RANDERS = dict(learn_metric=True, lambda_init=0.1, symmetric=False)
KINDS = {
    "default": dict(),
    "sphere": dict(space="sphere"),
    "flat": dict(preset="founding"),
    "randers": RANDERS,
    "prior": dict(prior=True),
    "moments": dict(moments=dict(components=6)),
}
SMALL = {
    "test_resnet": {},
    "test_vit": dict(img_size=32),
    "deit_tiny_distilled_patch16_224": dict(img_size=32, depth=2, embed_dim=48),
    "resnetv2_18": dict(channels=(16, 16, 24, 32), stem_chs=16),  # its classifier is a 1×1 convolution
}
LABELS = ["bird", "cat", "dog"]


def small(arch="test_resnet", faim_cfg=None, fit=True):
    """A fitted model of 3 classes for images of 32 pixels."""
    torch.manual_seed(0)
    model = timm.create_model(f"faim_{arch}", num_classes=3, faim_cfg=faim_cfg or {}, **SMALL[arch]).eval()
    model.pretrained_cfg.update(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    if fit:
        fit_(model, [(normalised(pixels(30), data_config_of(model)), torch.arange(30) % 3)])
    return model.eval()


def pixels(count=9):
    """Images in three colours, bytes [count, 32, 32, 3]."""
    x = torch.randint(0, 120, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    for i in range(count):
        x[i, :, :, i % 3] += 120
    return x


@pytest.fixture(params=FORMATS)
def suffix(request):
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    return FORMATS[request.param]


@pytest.fixture
def run_folder(tmp_path):
    """A model's folder with a record, and images of its classes."""
    save_model(small(), tmp_path / "run", label_names=LABELS)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"classifier": {"images": [10, 10, 10]}}))
    make_images(tmp_path / "images")
    return tmp_path / "run"


def same(got, wanted):
    spread = (wanted.amax(1) - wanted.amin(1)).mean()
    assert (got - wanted).abs().max() <= TOLERANCE * spread


@pytest.mark.parametrize("inside", [False, True], ids=["normalised", "bytes"])
def test_a_file_gives_what_the_model_gives_for_batches_of_any_size(suffix, inside, tmp_path):
    model, path = small("test_resnet", KINDS["moments"]), tmp_path / f"model{suffix}"
    export_model(model, path, preprocessing=inside, images=pixels(), metadata={"label_names": LABELS})
    file = Exported(path)
    assert file.label_names == LABELS
    assert file.data_config == data_config_of(model) | {"input_size": (3, 32, 32)}
    assert file.metadata["preprocessing"] == ("inside" if inside else "outside")
    for count in (1, 3, 20):
        images = pixels(count)
        wanted = model(normalised(images, data_config_of(model))).detach()
        same(file.logits(normalised(images, data_config_of(model)).numpy()), wanted)
        if inside:
            same(file(images), wanted)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_head_in_every_kind_of_place(arch, kind, tmp_path):
    model = small(arch, KINDS[kind])
    parity = export_model(model, tmp_path / "model.ts", images=pixels())
    assert parity.difference <= TOLERANCE
    assert parity.agreement == 1.0
    assert bool(parity.notes) == (kind in ("flat", "randers"))
    if kind == "randers":
        assert all("an unfolded Randers head" in note for note in parity.notes)
    assert Exported(tmp_path / "model.ts").metadata["notes"] == list(parity.notes)


def test_a_plain_timm_model_and_one_that_is_not_in_eval_mode(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).train()
    model.pretrained_cfg.update(input_size=(3, 32, 32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert export_model(model, tmp_path / "model.ts").difference <= TOLERANCE
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_are_folded_in_a_copy():
    model = small("test_vit", KINDS["moments"])
    folded, notes = fold_heads(model)
    assert isinstance(folded.head, FoldedHead)
    assert not isinstance(model.head, FoldedHead)
    assert notes == []
    x = normalised(pixels(), data_config_of(model))
    same(folded(x), model(x))


def test_probabilities(tmp_path):
    model, path = small(), tmp_path / "model.ts"
    export_model(model, path, output="probabilities", images=pixels())
    file, x = Exported(path), normalised(pixels(4), data_config_of(model))
    wanted = model(x).detach().softmax(1)
    torch.testing.assert_close(file(x), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(file.logits(x).softmax(1), wanted, rtol=1e-4, atol=1e-6)
    assert file.metadata["outputs"] == ["probabilities"]


def test_the_bytes_of_normalised_images_come_back_exactly():
    model = small(fit=False)
    every = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 32, 32, 3)
    assert torch.equal(pixels_of(normalised(every, data_config_of(model)), data_config_of(model)), every)


def test_half_precision_is_in_the_file_and_not_in_the_heads_arithmetic(suffix, tmp_path):
    model, half = small("test_resnet", KINDS["moments"]), tmp_path / f"half{suffix}"
    parity = export_model(model, half, dtype="float16", images=pixels())
    assert parity.agreement == 1.0
    assert parity.difference < 0.02
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert half.stat().st_size < 0.8 * weights  # the graph is a large part of so small a model
    program = Program(model, data_config_of(model), half=True)
    assert program.model.fc.weight.dtype is torch.float16
    assert program.model.fc.bias.dtype is torch.float32
    assert Exported(half)(normalised(pixels(2), data_config_of(model))).dtype is torch.float32


@pytest.mark.filterwarnings("ignore")
def test_int8_is_in_products_with_fixed_matrices_and_not_in_the_heads_lengths_and_roots(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = small("test_resnet", KINDS["moments"]), tmp_path / "model.onnx"
    parity = export_model(model, path, dtype="int8", images=pixels(12), calibration=pixels(30), agreement=0.5)
    assert parity.agreement >= 0.5
    nodes = onnx.load(path).graph.node
    quantised = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    rounded = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    kinds = {kind: [node for node in nodes if node.op_type == kind] for kind in ("Conv", "Gemm", "MatMul", "Sqrt")}
    assert all(kinds.values())
    assert all(set(node.input[:2]) <= quantised for node in [*kinds["Conv"], *kinds["Gemm"]])
    assert not any(set(node.output) & rounded for node in kinds["Gemm"])
    assert not any(set(node.input) & quantised for node in [*kinds["MatMul"], *kinds["Sqrt"]])
    assert Exported(path).metadata["dtype"] == "int8"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


class Branch(nn.Module):
    """A model that torch.jit.trace writes wrongly: it branches on the values."""

    num_classes = 2
    pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        out = x.mean((1, 2, 3))[:, None] * self.scale * torch.tensor([1.0, -1.0])
        return out if x.std() > 0.5 else out + 1.0 - 3.0 * self.scale[0] * out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_that_does_something_else_is_not_written(dtype, tmp_path):
    path = tmp_path / "model.ts"
    path.write_text("the one before")
    flat = torch.full((6, 32, 32, 3), 100, dtype=torch.uint8)
    with pytest.raises(ParityError, match="not written.*agrees on"):
        export_model(Branch(), path, dtype=dtype, images=flat)
    assert path.read_text() == "the one before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.ts"]


def test_an_interrupted_export_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "model.ts"
    path.write_text("the one before")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("timm_faim.export.write._compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(small(), path)
    assert path.read_text() == "the one before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.ts"]


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(format="tflite"), "format must be one of onnx, pt2, torchscript"),
        (dict(dtype="int4"), "dtype must be one of"),
        (dict(output="classes"), "output must be one of"),
        (dict(format="pt2"), "must not end in .ts"),
        (dict(dtype="int8"), "int8 is for onnx"),
    ],
)
def test_arguments_that_cannot_be(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        export_model(small(fit=False), tmp_path / "model.ts", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="ends in none of"):
        Exported(tmp_path / "model.bin")
    with pytest.raises(UserError, match="there is no file"):
        Exported(tmp_path / "model.ts")
    (tmp_path / "model.ts").write_text("no model")
    (tmp_path / "model.pt2").write_text("no model")
    for name in ("model.ts", "model.pt2"):
        with pytest.raises(UserError, match="cannot open"):
            Exported(tmp_path / name)
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(2)), tmp_path / "model.ts")
    with pytest.raises(UserError, match="no metadata of timm_faim"):
        Exported(tmp_path / "model.ts")


def test_images_of_another_shape(tmp_path):
    export_model(small(), tmp_path / "model.ts", images=pixels())
    file = Exported(tmp_path / "model.ts")
    for shape in ((1, 3, 33, 32), (3, 32, 32), (1, 32, 32, 3), (0, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"takes images \[B, 3, 32, 32\]"):
            file(torch.zeros(shape))


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnxscript.*pip install 'timm-faim\[export\]'"):
        export_model(small(fit=False), tmp_path / "model.onnx")


def command(*words):
    """Exit status of the command."""
    with pytest.raises(SystemExit) as exit:
        main(["export", *map(str, words)])
    return exit.value.code


def test_the_command_from_a_run_to_a_file(run_folder, tmp_path, capsys):
    path, images = tmp_path / "model.ts", tmp_path / "images" / "val"
    assert command(run_folder, "--output", path, "--with-preprocessing", "--images", images, "--check-count", 5) in (
        0,
        None,
    )
    said = capsys.readouterr().out
    assert "on 5 images the first class agrees on 100.00 %" in said
    assert "top-1 on these images: the model" in said
    file = Exported(path)
    assert file.label_names == LABELS
    assert file.metadata["classifier"] == {"images": [10, 10, 10]}
    samples = read_samples(images, file.data_config, 100)
    assert len(samples.pixels) == 7
    assert samples.folders[0] == "bird"
    model = timm.create_model(f"local-dir:{run_folder}", pretrained=True).eval()
    same(file(samples.pixels), model(normalised(samples.pixels, data_config_of(model))).detach())


@pytest.mark.parametrize(
    "words, said",
    [
        (["--output", "model.bin"], "ends in none of"),
        (["--output", "model.ts", "--format", "onnx"], "does not go with"),
        (["--output", "model.ts", "--dtype", "int8"], "int8 is for onnx"),
        (["--output", "model.onnx", "--dtype", "int8"], "--calibration-images DIR"),
        (["--output", "none/model.ts"], "there is no folder none"),
        (["--output", "model.ts", "--images", "none"], "--images none is no folder"),
        (["--output", "folder.ts"], "is a folder"),
    ],
)
def test_what_the_command_refuses(words, said, run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.ts").mkdir()
    assert command(run_folder, *words) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.ts", "images", "run"]


@pytest.mark.filterwarnings("ignore")
def test_the_command_says_how_to_go_on_where_the_file_differs(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm_faim.export.write.TOLERANCE", -1.0)
    assert command(run_folder, "--output", tmp_path / "model.ts", "--images", tmp_path / "images") == 1
    assert "Try another --format" in capsys.readouterr().err
    assert not (tmp_path / "model.ts").exists()
