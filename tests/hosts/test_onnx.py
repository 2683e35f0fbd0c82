"""What onnxruntime does with a model that torch.onnx has written, for batches of any size."""

import pytest
import torch
from habits import Case, close

from timm_faim import fit_

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["test_resnet", "test_vit"])
def test_exported_with_a_batch_of_any_size(arch, tmp_path):
    case = Case(arch, "moments")
    model = fit_(case.make(), [(case.x(20), torch.arange(20) % 5)])
    dynamic = ({0: torch.export.Dim("B")},)
    torch.onnx.export(model, (case.x(),), dynamo=True, dynamic_shapes=dynamic, verbose=False).save(tmp_path / "a.onnx")
    session = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        (logits,) = session.run(None, {session.get_inputs()[0].name: case.x(count).numpy()})
        close(torch.from_numpy(logits), model(case.x(count)), 1e-5)
