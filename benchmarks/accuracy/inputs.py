"""What of an image the network sees: the closed form under each crop, and what training images alone would choose.

    python benchmarks/accuracy/inputs.py --weights FILE --data leaf99=DIR grocery81=DIR omniglot242=DIR

Frozen features of tf_efficientnet_lite0 at 160 px. Crops are timm's; "own aspect" is the whole image at its own ratio
of sides, of about the same area and with sides in multiples of 32; an average of two counts both pictures in the fit
and adds their logits. The choice is that of `--crop-mode auto`: cross-validation on training images, of the mean alone
or with second moments. Views are one random crop of each training image, in the fit beside the clean picture. Lines
that the output has are not computed again.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from features import CACHE, hash_file, hash_folder, list_images, named_folders
from images import cut
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from timm_faim import FAIMHead, faim_heads, fit_
from timm_faim.head.fit import fit_moments_
from timm_faim.head.tap import layer_inputs, pooled
from timm_faim.images.crops import Crop
from timm_faim.training.data import SquashedCrop
from timm_faim.training.inputs import best_of, held_out

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import headline

SIDE, STEP, BATCH, RESULTS = 160, 32, 64, Path(__file__).parent / "results"
CROPS = [Crop("center", 0.875), Crop("center", 1.0), Crop("squash", 1.0), Crop("border", 1.0)]
OWN, AVERAGE = "own aspect", "center 0.875 + squash"
VIEWS = {"view rrc": None, "view squash": SquashedCrop}


def own_size(width: int, height: int) -> tuple[int, int]:
    """Height and width of about the area SIDE² for an image, in steps."""
    ratio = math.sqrt(width / height)
    return tuple(max(STEP, round(side / STEP) * STEP) for side in (SIDE / ratio, SIDE * ratio))


class Pictures:
    """(pictures [B, 3, H, W], their numbers [B]) of a list of files; of one shape in a batch."""

    def __init__(self, paths: list[Path], config: dict, kind: str) -> None:
        self.paths, self.config, self.kind, self.groups = paths, config, kind, {}
        for i, path in enumerate(paths):
            size = own_size(*Image.open(path).size) if kind == OWN else (SIDE, SIDE)
            self.groups.setdefault(size, []).append(i)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = [(s, at[k : k + BATCH]) for s, at in sorted(self.groups.items()) for k in range(0, len(at), BATCH)]
        if self.kind == OWN:  # the moments are fitted to the first: not to those of one shape
            generator = torch.Generator().manual_seed(0)
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        for size, numbers in batches:
            transform, rows = self._transform(size), []
            for i in numbers:
                torch.manual_seed(i)
                with Image.open(self.paths[i]) as image:
                    rows.append(transform(image.convert("RGB")))
            yield torch.stack(rows).contiguous(memory_format=torch.channels_last), torch.tensor(numbers)

    def _transform(self, size: tuple[int, int]):
        config = self.config | {"input_size": (3, *size)}
        if self.kind in VIEWS:
            transform = create_transform(**config, is_training=True, scale=(0.35, 1.0), color_jitter=None)
            if crop := VIEWS[self.kind]:
                transform.transforms[0] = crop(size, (0.35, 1.0), (3 / 4, 4 / 3), "bicubic")
            return transform
        crop = {str(crop): crop for crop in CROPS}.get(self.kind, Crop("squash", 1.0))
        return create_transform(**config | {"crop_mode": crop.mode, "crop_pct": crop.pct}, is_training=False)


def features_of(folder: Path, weights: Path, kind: str, cache: Path, data_hash: str) -> dict:
    """The head's input of both splits, [N, D] and [N], widths of its parts, and the seconds that they took."""
    file = cache / f"{data_hash[:12]}-{hash_file(weights)[:12]}-{SIDE}-{kind.replace(' ', '_')}-head.pt"
    if file.exists():
        return torch.load(file)
    overlay = {"file": str(weights), "num_classes": -1}
    model = timm.create_model("faim_tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay,
                              num_classes=2, faim_cfg={"moments": True}).eval()  # fmt: skip
    model, started = model.to(memory_format=torch.channels_last), time.perf_counter()
    head, config = next(iter(faim_heads(model).values())), resolve_data_config({"img_size": SIDE}, model=model)
    found = {"parts": head.parts}
    for split in ("train", "val"):
        paths, labels = list_images(folder / split)
        if split == "train":
            clean = str(CROPS[2]) if kind in VIEWS else kind
            fit_moments_(model, Pictures(paths, config, clean))
        x_ND = torch.empty(len(paths), head.in_features)
        for inputs, numbers in layer_inputs(model, {"head": head}, Pictures(paths, config, kind)):
            x_ND[numbers] = pooled(inputs["head"], head.in_features).float()
        found[split] = (x_ND, torch.tensor(labels))
    found["seconds"] = time.perf_counter() - started
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(found, file)
    return found


def accuracy(seen: list[Tensor], y: Tensor, tests: list[Tensor], target: Tensor, layer: FAIMHead) -> float:
    """Top-1 in % of a head fitted to the pictures of the training images, logits added over those of a test image."""
    probe = FAIMHead(seen[0].shape[1], int(target.max()) + 1, parts=layer.parts, part_weights=layer.weights_init).eval()
    fit_(probe, [(x, y) for x in seen])
    with torch.no_grad():
        return 100.0 * (sum(probe(x) for x in tests).argmax(1) == target).double().mean().item()


def line_of(found: dict[str, dict], moments: bool, shots: int) -> dict:
    """Validation accuracy of each kind of picture, what cross-validation makes of the crops, and its time."""
    first = found[str(CROPS[0])]
    parts, target = first["parts"] if moments else first["parts"][:1], first["val"][1]
    kept = cut(first["train"][1], shots, torch.Generator().manual_seed(0)).sort().values
    y, layer = first["train"][1][kept], FAIMHead(sum(parts), 2, parts=parts if moments else ())
    seen = {kind: each["train"][0][kept, : sum(parts)] for kind, each in found.items()}
    test = {kind: each["val"][0][:, : sum(parts)] for kind, each in found.items()}
    top1 = {kind: accuracy([seen[kind]], y, [test[kind]], target, layer) for kind in found if kind not in VIEWS}
    pair = AVERAGE.split(" + ")
    if set(pair) <= set(found):
        top1[AVERAGE] = accuracy([seen[k] for k in pair], y, [test[k] for k in pair], target, layer)
    whole = str(CROPS[2])
    for kind in set(VIEWS) & set(found):
        top1[f"squash, {kind}"] = accuracy([seen[whole], seen[kind]], y, [test[whole]], target, layer)
    crops, started = [str(crop) for crop in CROPS if str(crop) in found], time.process_time()
    right_KM = held_out(torch.stack([seen[crop] for crop in crops], 1), y, layer)
    shares = (100 * right_KM.mean(1)).tolist()
    cv, chosen = dict(zip(crops, shares, strict=True)), crops[best_of(right_KM)]
    return {"images": len(y), "top1": top1, "cv": cv, "chosen": chosen, "seconds": time.process_time() - started}


def tables(lines: list[dict]) -> Iterator[str]:
    for moments in (False, True):
        rows = [line for line in lines if line["moments"] == moments]
        if not rows:
            continue
        yield f"\n## {'Mean and second moments' if moments else 'Mean of the last map'}\n"
        names = [f"{line['data']} {line['shots'] or 'all'}" for line in rows]
        yield "| top-1 in % on validation images (on held-out training images) | " + " | ".join(names) + " |"
        yield "|---|" + "---:|" * len(rows)
        for kind in dict.fromkeys(kind for line in rows for kind in line["top1"]):
            cells = [f"{line['top1'][kind]:.1f}" + (f" ({line['cv'][kind]:.1f})" if kind in line["cv"] else "")
                     if kind in line["top1"] else "" for line in rows]  # fmt: skip
            yield f"| {kind} | " + " | ".join(cells) + " |"
        best = [max(line["cv"], key=lambda crop, line=line: line["top1"][crop]) for line in rows]
        yield "| **chosen** | " + " | ".join(f"{r['chosen']}: **{r['top1'][r['chosen']]:.1f}**" for r in rows) + " |"
        yield "| a perfect choice | " + " | ".join(
            f"{b}: {r['top1'][b]:.1f}" for r, b in zip(rows, best, strict=True)) + " |"  # fmt: skip
        seconds = [f"{r['seconds']:.0f}" if "seconds" in r else "" for r in rows]
        yield "| CPU seconds of the cross-validation | " + " | ".join(seconds) + " |"
        gain = [r["top1"][r["chosen"]] - r["top1"][str(CROPS[0])] for r in rows]
        lost = [r["top1"][b] - r["top1"][r["chosen"]] for r, b in zip(rows, best, strict=True)]
        yield (f"\nThe choice gains {sum(gain) / len(gain):+.2f} on average over the model's own crop and is "
               f"{sum(lost) / len(lost):.2f} behind a perfect one.")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of tf_efficientnet_lite0")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--square", nargs="*", default=["omniglot242"], metavar="NAME", help="data of square images")
    parser.add_argument("--views", nargs="*", default=["leaf99"], metavar="NAME", help="data to draw views of")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5], help="images a class; 0: all")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for features")
    parser.add_argument("--output", type=Path, default=RESULTS / "inputs.md")
    args = parser.parse_args()
    record = args.output.with_suffix(".jsonl")
    lines = [json.loads(text) for text in record.read_text().splitlines()] if record.exists() else []
    for name, folder in named_folders(args.data).items():
        square, data_hash = name in args.square, hash_folder(folder)
        kinds = [str(crop) for crop in (CROPS[:2] if square else CROPS)] + [OWN] * (not square)
        kinds += list(VIEWS) if name in args.views else []
        found = {kind: features_of(folder, args.weights, kind, args.cache, data_hash) for kind in kinds}
        for moments in (False, True):
            for shots in args.shots:
                key = {"data": name, "shots": shots, "moments": moments}
                if not any(line.items() >= key.items() for line in lines):
                    lines.append(key | line_of(found, moments, shots))
                    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
                    print(lines[-1], flush=True)
    command = "python benchmarks/accuracy/inputs.py --weights FILE --data leaf99=DIR grocery81=DIR omniglot242=DIR"
    head = ["# What of an image the network sees\n", headline(command, cuda=False) + "\n", *__doc__.split("\n\n")[2:]]
    args.output.write_text("\n".join([*head, *tables(lines)]) + "\n")


if __name__ == "__main__":
    main()
