"""Exported files: whether they do what the model does, what the head costs in onnxruntime, and what a dtype costs.

    python benchmarks/export.py parity                            # formats × dtypes × heads × architectures
    python benchmarks/export.py head                              # the head alone, against nn.Linear
    python benchmarks/export.py dtypes DATA --weights FILE        # accuracy, size and latency on DATA/{train,val}

The parity models are small and untrained, their heads fitted to the bundled drawings, which are the images of the
check. The head's files are run in turn, round after round, in onnxruntime on 2 threads: a drift of the machine's speed
touches all of them alike. `dtypes` fits heads in closed form on tf_efficientnet_lite0 and calibrates int8 with 128 of
the training images.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from machine import headline
from torch import Tensor, nn

from timm_faim import FAIMHead, FoldedHead, fit_, to_linear
from timm_faim.data import omniglot242_root
from timm_faim.export import Exported, export_model
from timm_faim.export.program import data_config_of, normalised
from timm_faim.export.samples import Samples, read_samples

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".ts"}
KINDS = {
    "indicatrix": dict(),
    "sphere": dict(space="sphere"),
    "flat": dict(preset="founding"),
    "Randers": dict(learn_metric=True, lambda_init=0.1, symmetric=False),
    "prior": dict(prior=True),
    "moments": dict(moments=dict(components=8)),
}
ARCHITECTURES = {
    "test_vit": dict(img_size=64),
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "deit_tiny_distilled_patch16_224": dict(img_size=64, depth=3, embed_dim=96),
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": dict(
        img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)
    ),
    "resnetv2_18": dict(channels=(16, 16, 24, 32), stem_chs=16),  # its classifier is a 1×1 convolution
}
QUICK = ("indicatrix", "moments")  # kinds for which float16 is tried as well


def parity_table() -> None:
    print("| architecture | head | " + " | ".join(f"{f} float32" for f in SUFFIXES), end=" | ")
    print("onnx float16 |\n|---|---|---|---|---|---|")
    for arch, options in ARCHITECTURES.items():
        for kind, faim_cfg in KINDS.items():
            model, samples = _small(arch, options, faim_cfg)
            cells = [_parity(model, samples, format, "float32") for format in SUFFIXES]
            cells.append(_parity(model, samples, "onnx", "float16") if kind in QUICK else "")
            print(f"| {arch} | {kind} | " + " | ".join(cells) + " |", flush=True)


def _small(arch: str, options: dict, faim_cfg: dict) -> tuple[nn.Module, Samples]:
    torch.manual_seed(0)
    model = timm.create_model(f"faim_{arch}", num_classes=10, faim_cfg=faim_cfg, **options).eval()
    model.pretrained_cfg.update(input_size=(3, 64, 64))
    config = data_config_of(model)
    samples = read_samples(omniglot242_root() / "val", config, 100)
    fit_(model, [(normalised(samples.pixels, config), torch.arange(100) // 10)])
    return model.eval(), samples


def _parity(model: nn.Module, samples: Samples, format: str, dtype: str) -> str:
    """The largest difference over the spread of the logits, with the share of equal first classes where it is not all;
    of one image and of 3 from the same file as well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"model{SUFFIXES[format]}")
        found = export_model(model, path, dtype=dtype, images=samples.pixels, agreement=0.0)
        file, config = Exported(path), data_config_of(model)
        for count in (1, 3):
            assert file(normalised(samples.pixels[:count], config)).shape == (count, 10)
    return f"{found.difference:.0e}" + (f" ({100 * found.agreement:.0f} %)" if dtype != "float32" else "")


class _Softmax(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).softmax(-1)


def head_table(D: int, C: int, rounds: int) -> None:
    torch.manual_seed(0)
    head = FAIMHead(D, C).eval()
    with torch.no_grad():
        head.whiten.add_(0.3 * torch.randn(D, D) / D**0.5)
        head.center.normal_()
    linear, folded = nn.Linear(D, C), FoldedHead(head)
    ways = {
        "Linear": linear,
        "Linear, softmax": _Softmax(linear),
        "`to_linear(head)`: the order alone": to_linear(head),
        "`FoldedHead(head)`": folded,
        "`FoldedHead(head)`, softmax": _Softmax(folded),
        "FAIMHead, not folded": head,
    }
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            name: _session(way.eval(), D, Path(folder, f"{i}.onnx")) for i, (name, way) in enumerate(ways.items())
        }
    print(f"\n### D={D}, C={C}, {rounds} rounds; ratios to Linear with the same output\n")
    print("| | 1 image, median µs | ratio | of quartiles | 64 images, median µs | ratio | of quartiles |")
    print("|---|---|---|---|---|---|---|")
    cells = {name: [] for name in ways}
    for B in (1, 64):
        x = torch.randn(B, D).numpy()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, session in sessions.items():
                begin = time.perf_counter()
                session.run(None, {"x": x})
                times[name].append(time.perf_counter() - begin)
        for name in ways:
            base = "Linear, softmax" if name.endswith("softmax") else "Linear"
            ratios = [measure(times[name]) / measure(times[base]) for measure in (statistics.median, _quartile)]
            cells[name] += [f"{statistics.median(times[name]) * 1e6:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
    for name in ways:
        print(f"| {name} | " + " | ".join(cells[name]) + " |", flush=True)


def _quartile(times: list[float]) -> float:
    """The first quartile, which feels others on the machine less than the median does."""
    return statistics.quantiles(times, n=4)[0]


def _session(head: nn.Module, D: int, path: Path):
    import onnxruntime

    dynamic = ({0: torch.export.Dim("B")},)
    torch.onnx.export(
        head, (torch.randn(2, D),), dynamo=True, dynamic_shapes=dynamic, input_names=["x"], verbose=False
    ).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def dtypes_table(data: Path, weights: str, size: int, rounds: int) -> None:
    print(f"\n### {data.name}, {size} pixels\n")
    print("| features | file | top-1, % | as float32, % of images | MiB | 1 image, ms | 16 images, ms |")
    print("|---|---|---|---|---|---|---|")
    for features, faim_cfg in (("mean", {}), ("mean and second moments", dict(moments=True))):
        classes = sorted(path.name for path in (data / "train").iterdir() if path.is_dir())
        model = timm.create_model(
            "faim_tf_efficientnet_lite0",
            pretrained=True,
            pretrained_cfg_overlay=dict(file=weights),
            num_classes=len(classes),
            faim_cfg=faim_cfg,
        ).eval()
        model.pretrained_cfg.update(input_size=(3, size, size), crop_pct=1.0, crop_mode="squash")
        config = data_config_of(model)
        train, val = (read_samples(data / split, config, 10**6) for split in ("train", "val"))
        targets = torch.tensor([classes.index(name) for name in train.folders])
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).split(64)
        fit_(model, [(normalised(train.pixels[i], config), targets[i]) for i in order])
        wanted = torch.tensor([classes.index(name) for name in val.folders])
        with tempfile.TemporaryDirectory() as folder:
            files = {}
            for dtype in ("float32", "float16", "int8"):
                path = Path(folder, f"{dtype}.onnx")
                calibration = train.spread(128).pixels
                export_model(
                    model, path, dtype=dtype, images=val.spread(16).pixels, calibration=calibration, agreement=0.0
                )
                files[dtype] = Exported(path, threads=2)
            first = {}
            for dtype, file in files.items():
                found = [file(normalised(batch, config)).argmax(1) for batch in val.pixels.split(32)]
                first[dtype] = torch.cat(found)
            times = _latencies(files, normalised(val.pixels[:16], config), rounds)
            for dtype, file in files.items():
                right = 100 * (first[dtype] == wanted).float().mean()
                same = 100 * (first[dtype] == first["float32"]).float().mean()
                taken = " | ".join(f"{1e3 * statistics.median(times[dtype, B]):.1f}" for B in (1, 16))
                mib = file.path.stat().st_size / 2**20
                print(f"| {features} | {dtype} | {right:.2f} | {same:.2f} | {mib:.1f} | {taken} |", flush=True)


def _latencies(files: dict[str, Exported], x: Tensor, rounds: int) -> dict[tuple[str, int], list[float]]:
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for dtype, file in files.items():
            for B in (1, 16):
                begin = time.perf_counter()
                file(x[:B])
                times.setdefault((dtype, B), []).append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["parity", "head", "dtypes"])
    parser.add_argument("data", nargs="?", type=Path, help="of dtypes: folder with train/ and val/")
    parser.add_argument("--weights", help="of dtypes: safetensors of timm's tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=192, help="of dtypes: pixels (default: 192)")
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    if args.table == "dtypes" and not (args.data and args.weights):
        parser.error("dtypes needs DATA and --weights FILE")
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    print(headline(f"python benchmarks/export.py {' '.join(sys.argv[1:])}", cuda=False))
    print("; ".join(f"{name} {version(name)}" for name in ("onnx", "onnxscript", "onnxruntime")) + "\n")
    if args.table == "parity":
        parity_table()
    elif args.table == "head":
        for C in (1000, 21841):
            head_table(768, C, args.rounds if C == 1000 else max(20, args.rounds // 4))
    else:
        dtypes_table(args.data, args.weights, args.size, args.rounds)


if __name__ == "__main__":
    main()
