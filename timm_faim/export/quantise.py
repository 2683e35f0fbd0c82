"""Static quantisation of an ONNX file to int8 by onnxruntime: weights per channel, activations by calibration."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter keeps the modules that a node came from
# products with fixed weights, and what becomes part of them; 8 bits for sums and layer norms cost a ViT far more
_QUANTISED = ("Conv", "Gemm", "MatMul", "Clip", "Relu")
_PRODUCTS = ("Gemm",)  # of the heads
_BATCH = 8


def quantise(path: Path, images: Tensor, float_scopes: Sequence[str]) -> None:
    """Replace an ONNX file by its int8 version (QDQ).

    Args:
        path: of a float32 file that torch.onnx has written.
        images: as the file takes them, for the ranges of the activations.
        float_scopes: names of modules that stay in float32: heads and second moments. Of these the products with fixed
            matrices take 8-bit weights and inputs too, and give float32, of which roots and lengths are made.

    Raises:
        ValueError: the file does not say which modules its nodes are of.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches: Iterator[dict[str, np.ndarray]] = iter([{name: b.numpy()} for b in images.split(_BATCH)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    model = onnx.load(path)
    kept = {prop.key: prop.value for prop in model.metadata_props}
    if not any(prop.key == _SCOPES for node in model.graph.node for prop in node.metadata_props):
        raise ValueError("int8 needs a file that says which modules its nodes are of; a newer torch writes that")
    fixed = {tensor.name for tensor in model.graph.initializer}
    excluded = [
        node.name
        for node in model.graph.node
        if (node.op_type not in _PRODUCTS and _within(node, float_scopes))
        or (node.op_type == "MatMul" and not fixed & set(node.input))
    ]
    with _quiet(), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        result = Path(folder, "int8.onnx")
        quantize_static(
            str(path),
            str(result),
            Batches(model.graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=list(_QUANTISED),
            nodes_to_exclude=excluded,
            extra_options={"OpTypesToExcludeOutputQuantization": list(_PRODUCTS)},
        )
        quantised = onnx.load(result)
        onnx.helper.set_model_props(quantised, kept)
        onnx.save(quantised, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice to optimise the graph first, which torch's exporter has done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _within(node, scopes: Sequence[str]) -> bool:
    """Whether a node came from one of these modules."""
    names = next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "")
    return any(f"'{scope}'" in names for scope in scopes)
