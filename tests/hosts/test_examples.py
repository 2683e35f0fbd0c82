"""What the examples of other libraries show is so: each runs, small, and does what its text says."""

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from habits import close
from torch.nn.functional import cross_entropy, one_hot

from timm_faim import FAIMHead, faim_heads, fit_
from timm_faim.report.evaluation import collect

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "sample")
SMALL = ["--classes", "4", "--img-size", "32", "--epochs", "1"]
CNN = [*SMALL, "--model", "faim_test_resnet"]

sys.path.insert(0, str(ROOT / "examples"))  # scripts, with sample.py beside them

pytestmark = pytest.mark.filterwarnings("ignore")


def example(name, package):
    """An example as a module; skips where its library is missing."""
    pytest.importorskip(package)
    return importlib.import_module(name)


def with_margin(logits, targets, head):
    """The loss of logits after the head's margin, written out."""
    return cross_entropy(logits - head.gamma() * head.margin * one_hot(targets, logits.shape[1]), targets)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_says_how_it_runs_and_is_listed(path):
    text = path.read_text(encoding="utf-8")
    assert f"    python examples/{path.name}" in text and "    pip install timm-faim " in text
    assert f"examples/{path.name}" in (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")


def test_the_extra_installs_what_they_need():
    needed = {re.search("    pip install timm-faim ([a-z-]+)\n", path.read_text("utf-8")).group(1) for path in EXAMPLES}
    extra = re.search(r"^examples = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE).group(1)
    assert set(re.findall('"([a-z-]+)', extra)) == needed


def test_a_folder_without_images_is_an_error(tmp_path, capsys):
    sample = importlib.import_module("sample")
    with pytest.raises(SystemExit):
        sample.parse(sample.parser("text"), ["--data-dir", str(tmp_path)])
    assert "train/ and val/" in capsys.readouterr().err


@pytest.fixture(scope="module")
def learner():
    return example("fastai_learner", "fastai").main(CNN)


def test_a_learner_keeps_and_trains_the_head(learner):
    (head,) = faim_heads(learner.model).values()
    assert learner.model.get_classifier() is head and head.num_classes == learner.dls.c == 4
    learner.model.train()
    images, targets = (x.as_subclass(torch.Tensor) for x in learner.dls.one_batch())
    logits = learner.model(images)
    loss = learner.loss_func(logits, targets)
    close(loss.as_subclass(torch.Tensor), with_margin(logits, targets, head))
    head.mu.grad = None
    loss.backward()
    assert head.mu.grad.abs().sum() > 0


def test_a_learner_trains_what_its_groups_say(learner):
    model = timm.create_model("faim_test_resnet", num_classes=4)
    learn = type(learner)(learner.dls, model, type(learner.loss_func)(model), splitter=learner.splitter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    convolutions = {name for name, parameter in before.items() if parameter.ndim == 4}

    def changed():
        return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}

    learn.freeze()
    learn.fit(1, 1e-2)
    assert {"fc.mu", "fc.scale"} <= changed() and not changed() & convolutions  # of the backbone batch norm learns
    learn.unfreeze()
    learn.fit(1, slice(1e-3, 1e-2))
    assert convolutions <= changed() and not changed() & {"fc.center", "fc.whiten"}


def test_groups_of_all_parameters_let_the_statistics_learn(learner):
    import fastai.vision.all as fv

    model = timm.create_model("faim_test_resnet", num_classes=4)
    learn = fv.Learner(learner.dls, model, learner.loss_func, splitter=lambda model: [fv.params(model)])
    learn.unfreeze()
    assert model.fc.center.requires_grad and model.fc.whiten.requires_grad


def test_a_learner_predicts_the_nearest_prototype(learner):
    path = learner.dls.valid_ds.items[-1]
    learner.model.eval()
    with learner.no_bar(), torch.no_grad():
        name, number, probabilities = learner.predict(path)
        images = learner.dls.test_dl([path]).one_batch()[0].as_subclass(torch.Tensor)
        close(probabilities.as_subclass(torch.Tensor), learner.model(images).softmax(1)[0])
    assert int(number) == int(probabilities.argmax()) and name == learner.dls.vocab[int(number)]
    with learner.no_bar():  # a loss for each image, without the margin, which is for training alone
        outputs, targets, losses = learner.get_preds(with_loss=True)
    close(losses.as_subclass(torch.Tensor), -outputs[range(len(targets)), targets].log().as_subclass(torch.Tensor))


def test_classes_are_in_the_order_of_timm(learner):
    import fastai.vision.all as fv

    sample = importlib.import_module("sample")
    assert list(learner.dls.vocab) == sample.class_names(sample.parse(sample.parser("text"), SMALL))
    assert list(fv.CategoryMap(["2", "10"])) == ["10", "2"]  # fastai's own order, which the example does without


def test_the_usual_vision_learner_has_no_faim_head(learner):
    import fastai.vision.all as fv

    model = fv.vision_learner(learner.dls, "faim_test_resnet", pretrained=False).model
    assert faim_heads(model) == {} and isinstance(model[-1][-1], torch.nn.Linear)


def test_batches_of_fastai_need_the_wrapper(learner):
    with pytest.raises(TypeError):
        fit_(timm.create_model("faim_test_resnet", num_classes=4), learner.dls.train)
    plain = example("fastai_learner", "fastai").PlainBatches(learner.dls.valid)
    model = fit_(timm.create_model("faim_test_resnet", num_classes=4, faim_cfg={"moments": True}), plain)
    copied = [(images.clone(), targets.clone()) for images, targets in plain]
    again = copy.deepcopy(model)
    assert type(copied[0][0]) is torch.Tensor and torch.equal(fit_(again, copied).fc.mu, model.fc.mu)


@pytest.fixture(scope="module")
def lightning(tmp_path_factory):
    """The example, its module after training, and its checkpoint."""
    found = example("lightning_module", "lightning")
    folder = tmp_path_factory.mktemp("lightning")
    module, _ = found.main([*CNN, "--devices", "1", "--output", str(folder)])
    return found, module.cpu(), folder


def prototypes_at_start(lightning, module, batches, checkpoint=None):
    """Prototypes of a module when Lightning is about to train it."""
    seen = []
    note = lightning.L.pytorch.callbacks.LambdaCallback(
        on_train_start=lambda _, module: seen.append(module.model.fc.mu.detach().clone())
    )
    trainer = lightning.L.Trainer(
        max_epochs=2,
        limit_train_batches=1,
        callbacks=[note],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches, ckpt_path=checkpoint)
    return seen[0]


def test_lightning_trains_with_the_margin(lightning):
    _, module, _ = lightning
    images, targets = next(iter(module.images))
    module.train()
    loss = module.training_step((images, targets), 0)
    close(loss, with_margin(module(images), targets, module.model.fc))
    module.model.fc.mu.grad = None
    loss.backward()
    assert module.model.fc.mu.grad.abs().sum() > 0


def test_lightning_starts_from_data(lightning):
    found, module, _ = lightning
    other = found.Classifier("faim_test_resnet", 4, images=list(module.images))
    fitted = fit_(copy.deepcopy(other.model), other.images).fc.mu
    close(prototypes_at_start(found, other, module.images), fitted)


def test_lightning_goes_on_from_a_checkpoint_with_its_head(lightning):
    found, module, folder = lightning
    checkpoint = folder / "last.ckpt"
    other = found.Classifier("faim_test_resnet", 4, images=list(module.images))
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]["model.fc.mu"]
    assert torch.equal(prototypes_at_start(found, other, module.images, checkpoint), saved)
    opened = found.Classifier.load_from_checkpoint(checkpoint)
    assert torch.equal(opened.model.fc.mu, saved)


def test_lightning_ends_in_closed_form_and_saves_for_timm(lightning):
    _, module, folder = lightning
    opened = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True)
    assert torch.equal(opened.fc.mu, module.model.fc.mu)
    close(fit_(copy.deepcopy(opened), module.images).fc.mu, opened.fc.mu)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return example("peft_lora", "peft").main([*SMALL, "--output", str(folder)])


def test_lora_changes_adapters_and_head_alone(lora):
    base, model, _, _ = lora
    before = dict(base.named_parameters())
    adapters, others = [], []
    for name, parameter in model.base_model.model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            adapters.append(name)
            continue
        others.append(name.replace("base_layer.", "").replace("original_module.", ""))
        assert torch.equal(parameter, before[others[-1]]), name
    assert sorted(others) == sorted(before) and adapters
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = model.base_model.model.head.modules_to_save["default"]
    changed = {name for name, p in head.named_parameters() if not torch.equal(p, before[f"head.{name}"])}
    assert changed == {"mu", "scale"}
    assert {name.rsplit(".", 1)[1] for name in learned if "lora_" not in name} == changed
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)  # 0 at first


def test_lora_opens_again_and_merges(lora):
    base, model, again, images = lora
    with torch.no_grad():
        wanted = model(images)
        assert torch.equal(again(images), wanted) and not torch.allclose(base(images), wanted)
        merged = copy.deepcopy(again).merge_and_unload()
        close(merged(images), wanted)
    assert type(merged) is type(base) and isinstance(merged.head, FAIMHead)


def test_peft_alone_would_let_the_statistics_learn(lora):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(lora[0]), LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))
    head = model.base_model.model.head.modules_to_save["default"]
    assert head.center.requires_grad and head.whiten.requires_grad and len(faim_heads(model)) == 2


def test_attributions_sum_to_the_difference():
    attributions, gain = example("captum_attributions", "captum").main(CNN)
    assert attributions.shape == (1, 3, 32, 32)
    assert gain != 0 and abs(float(attributions.sum()) - gain) < 0.02 * abs(gain)


def test_attributions_are_of_distances():
    captum = example("captum_attributions", "captum")
    model = timm.create_model("faim_test_resnet", num_classes=4).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        points = model.fc.embed(model.forward_head(model.forward_features(images), pre_logits=True))
        distances = model.fc.metric.reference(points, model.fc.project(model.fc.mu))
        close(captum.Nearer(model, 1, 2)(images), distances[:, 2] - distances[:, 1])


def test_maps_of_a_class():
    maps, images = example("grad_cam", "pytorch_grad_cam").main(CNN)
    assert maps.shape == (len(images), 32, 32)
    assert maps.min() >= 0 and maps.max() <= 1 and (maps.std((1, 2)) > 0).mean() > 0.5


def test_numbers_of_torchmetrics_are_those_of_the_evaluation():
    model, batches, found = example("torchmetrics_evaluation", "torchmetrics").main(CNN)
    ours = collect(model, batches, Accelerator(cpu=True))
    wanted = ours.metrics()
    for name in ("top1", "mean_class_top1", "ece"):
        assert 100 * float(found[name]) == pytest.approx(wanted[name], abs=1e-3), name
    assert (found["confusion"].numpy() == ours.confusion()).all() and 0 < wanted["top1"] < 100
