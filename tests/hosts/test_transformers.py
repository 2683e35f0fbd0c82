"""What transformers does with a folder that timm's ``save_for_hf`` has written."""

import copy
import json

import pytest
import timm
import torch
from habits import CLASSES, cases, heads, listed, parity, step
from timm.models import save_for_hf

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)


def saved(case, folder, **arguments):
    """A model whose head is not as it starts, and the folder of it."""
    model = case.make(**arguments)
    with torch.no_grad():
        for _, head in heads(model):
            for name, tensor in (*head.named_parameters(), *head.named_buffers()):
                if "metric" not in name:
                    tensor.add_(0.01)
    return model, written(model, folder / "model")


def written(model, path):
    """A folder for transformers, which takes the number of classes from one place and not from two."""
    save_for_hf(model, path)
    config = json.loads((path / "config.json").read_text())
    config["model_args"].pop("num_classes", None)
    (path / "config.json").write_text(json.dumps(config))
    return path


def fits(case, model):
    """The numbers are those of a fresh or a trained model, not of memory that nobody has filled."""
    assert all(
        torch.isfinite(t).all() and t.abs().max() < 1e3
        for t in (*model.parameters(), *model.buffers())
        if t.is_floating_point()
    )
    step(model, case.x(), lambda x: model(x).logits)


def opened(case, folder):
    model, path = saved(case, folder)
    case.same(lambda x: AutoModelForImageClassification.from_pretrained(path).eval()(x).logits, model)


def opened_by_timm(case, folder):
    model, path = saved(case, folder)
    case.same(timm.create_model(f"local-dir:{path}", pretrained=True).eval(), model)


def opened_with_other_labels(case, folder):
    model, path = saved(case, folder)
    torch.empty(10**6).fill_(1e30)  # what memory may hold
    other = AutoModelForImageClassification.from_pretrained(path, num_labels=3, ignore_mismatched_sizes=True)
    if case.form is None:
        return fits(case, other)
    for (_, head), (_, old) in zip(heads(other.timm_model), heads(model), strict=True):
        state, kept = head.state_dict(), old.state_dict()
        assert state["mu"].shape[0] == 3 and 0.01 < state["mu"].std() < 2
        for name in kept:
            if name != "mu":
                torch.testing.assert_close(state[name], kept[name])
    fits(case, other)


def opened_without_a_head(case, folder):
    """A backbone that was saved without classes gets some."""
    model = case.make()
    model.reset_classifier(0)
    path = written(model, folder / "model")
    torch.empty(10**6).fill_(1e30)
    other = AutoModelForImageClassification.from_pretrained(path, num_labels=3)
    if case.form is not None:
        for _, head in heads(other.timm_model):
            state = head.state_dict()
            fresh = timm.create_model(case.name, **case.arguments())
            for name, value in heads(fresh)[0][1].state_dict().items():
                if name not in ("mu", "metric.beta"):
                    torch.testing.assert_close(state[name], value, msg=name)
            assert 0.01 < state["mu"].std() < 2
    fits(case, other)


def opened_as_a_backbone(case, folder):
    _, path = saved(case, folder)
    assert torch.isfinite(AutoModel.from_pretrained(path)(case.x()).last_hidden_state).all()


def opened_in_bfloat16(case, folder):
    _, path = saved(case, folder)
    model = AutoModelForImageClassification.from_pretrained(path, dtype=torch.bfloat16)
    assert model(case.x()).logits.dtype == torch.bfloat16


def opened_with_a_device_map(case, folder):
    model, path = saved(case, folder)
    other = AutoModelForImageClassification.from_pretrained(path, device_map="cpu").eval()
    case.same(lambda x: other(x).logits, model)


def made_from_a_config(case, folder):
    _, path = saved(case, folder)
    fits(case, AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(path)))


def saved_again(case, folder):
    model, path = saved(case, folder)
    AutoModelForImageClassification.from_pretrained(path).save_pretrained(folder / "again")
    other = AutoModelForImageClassification.from_pretrained(folder / "again").eval()
    case.same(lambda x: other(x).logits, model)
    case.same(timm.create_model(f"local-dir:{folder / 'again'}", pretrained=True).eval(), model)


def copied(case, folder):
    _, path = saved(case, folder)
    model = AutoModelForImageClassification.from_pretrained(path).eval()
    case.same(lambda x: copy.deepcopy(model)(x).logits, model(case.x()).logits)


def piped(case, folder):
    from PIL import Image

    _, path = saved(case, folder)
    pipe = pipeline(
        "image-classification",
        model=AutoModelForImageClassification.from_pretrained(path),
        image_processor=AutoImageProcessor.from_pretrained(path),
    )
    assert len(pipe(Image.new("RGB", (40, 40)), top_k=CLASSES)) == CLASSES


def trained(case, folder):
    _, path = saved(case, folder)
    model = AutoModelForImageClassification.from_pretrained(path, num_labels=3, ignore_mismatched_sizes=True)
    data = [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(case.x(4))]
    options = TrainingArguments(
        folder / "run",
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="steps",
        save_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model, options, train_dataset=data)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    trainer.train(resume_from_checkpoint=True)


HABITS = listed(globals(), __name__, ("case", "folder"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("habit", "case"), cases(HABITS, heavy=("trained",)))
def test_habit(habit, case, tmp_path):
    parity(habit, case, {}, tmp_path)
