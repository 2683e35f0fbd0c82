"""Trained classifiers as files that run without this package: ONNX, torch.export and TorchScript."""

from timm_faim.export.exported import Exported
from timm_faim.export.program import fold_heads
from timm_faim.export.write import DTYPES, FORMATS, OUTPUTS, Parity, ParityError, export_model

__all__ = ["DTYPES", "FORMATS", "OUTPUTS", "Exported", "Parity", "ParityError", "export_model", "fold_heads"]
