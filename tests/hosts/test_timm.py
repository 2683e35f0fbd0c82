"""What timm's own helpers do with a timm model."""

import pytest
import timm
import torch
from habits import CLASSES, FORMS, Case, cases, close, heads, listed, parity, step
from timm.models import FeatureGraphNet, GraphExtractNet
from torch import nn


def reset_to_other_classes(case):
    model = case.make()
    model.reset_classifier(3)
    assert model(case.x()).shape == (2, 3) and model.num_classes == 3


def reset_to_none_and_back(case):
    model = case.make()
    model.reset_classifier(0)
    assert model(case.x()).shape == (2, model.num_features)
    model.reset_classifier(CLASSES)
    step(model, case.x())


def features_then_head(case):
    model = case.make()
    case.same(lambda x: model.forward_head(model.forward_features(x)), model)
    assert model.forward_head(model.forward_features(case.x()), pre_logits=True).dim() in (2, 4)


def intermediates(case):
    model = case.make()
    last, inner = model.forward_intermediates(case.x())
    assert inner and torch.isfinite(last).all()


def features(case, **options):
    model = case.make(features_only=True, **options)
    assert len(model(case.x())) > 0
    assert case.form != "blocks" or any("faim_chart" in name for name, _ in model.named_parameters())


def features_of_a_saved_model(case):
    from tempfile import TemporaryDirectory

    from timm.models import save_for_hf

    model = case.make()
    with TemporaryDirectory() as folder:
        save_for_hf(model, folder)
        for kind in ("hook", "getter"):
            net = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, feature_cls=kind).eval()
            wanted = dict(model.named_parameters())
            charts = [(name, p) for name, p in net.named_parameters() if "faim_chart" in name]
            assert case.form != "blocks" or charts
            for name, p in charts:
                name = name.removeprefix("model.").removeprefix("body.")
                close(p, wanted[name if name in wanted else name.replace("_", ".", 1)])


def features_only(case):
    features(case, num_classes=0)


def features_only_by_hooks(case):
    features(case, feature_cls="hook")


def features_only_getter(case):
    features(case, feature_cls="getter")


def features_only_dictionary(case):
    features(case, feature_cls="dict")


def features_only_by_graph(case):
    features(case, feature_cls="fx")


def graph_extractor(case):
    model = case.make()
    name = heads(model)[0][0]
    net = GraphExtractNet(model, [name]).eval()
    close(net(case.x()).flatten(1), head_output(model, name, case.x()).flatten(1))
    step(net, case.x(), lambda x: net(x).flatten(1))


def graph_of_features(case):
    net = FeatureGraphNet(case.make(), out_indices=(1,))
    assert torch.isfinite(net(case.x())[0]).all()


def head_output(model, name, x):
    kept = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, out: kept.append(out))
    model(x)
    handle.remove()
    return kept[0]


def made_with_a_device(case):
    model = case.make(device="meta")
    assert all(p.is_meta for p in model.parameters())


def made_in_bfloat16(case):
    model = case.make(dtype=torch.bfloat16)
    assert model(case.x().bfloat16()).dtype == torch.bfloat16


def made_scriptable(case):
    model = case.make(scriptable=True)
    case.same(torch.jit.script(model), model)


def made_exportable(case):
    model = case.make(exportable=True)
    case.same(torch.export.export(model, (case.x(),)).module(), model)


def one_channel(case):
    assert case.make(in_chans=1)(case.x()[:, :1]).shape == (2, CLASSES)


def dropout_and_pooling(case):
    step(case.make(drop_rate=0.2, drop_path_rate=0.1), case.x())


def another_pooling(case):
    assert case.make(global_pool="avg")(case.x()).shape == (2, CLASSES)


def gradient_checkpointing(case):
    model = case.make()
    model.set_grad_checkpointing(True)
    step(model, case.x())


def layer_decay_groups(case):
    model = case.make()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def optimizers(case):
    for name in ("lamb", "muon", "adafactorbv", "nadamw", "lion", "cadamw"):
        model = case.make()
        optimizer = timm.optim.create_optimizer_v2(model, name, lr=1e-3)
        model.train()(case.x())
        out = model(case.x())
        (out if isinstance(out, torch.Tensor) else out[0]).square().mean().backward()
        optimizer.step()
        assert torch.isfinite(model.eval()(case.x())).all(), name


def average_of_weights(case):
    model = case.make()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    step(model, case.x())
    average.update(model)
    assert torch.isfinite(average.module(case.x())).all()


def adaptive_clipping(case):
    model = case.make().train()
    out = model(case.x())
    (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    timm.utils.dispatch_clip_grad([p for p in model.parameters() if p.grad is not None], 0.01, mode="agc")
    assert torch.isfinite(model.eval()(case.x())).all()


def freezing(case):
    model = case.make()
    timm.utils.freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    timm.utils.unfreeze(model)


def reparameterizing(case):
    model = case.make()
    wanted = model(case.x())
    case.same(timm.utils.reparameterize_model(model), wanted)


def training_task(case):
    model = case.make().train()
    from timm.task import ClassificationTask

    ClassificationTask(model, criterion=nn.CrossEntropyLoss())(case.x(), torch.tensor([0, 1]))["loss"].backward()


def another_image_size(case):
    model = case.make()
    model.set_input_size((64, 64))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, CLASSES)


def data_config(case):
    config = timm.data.resolve_model_data_config(case.make())
    assert timm.data.create_transform(**config) is not None


def classifier_by_the_name_of_its_weight(case):
    model = case.make()
    name = model.default_cfg["classifier"]
    name = name if isinstance(name, str) else name[0]
    assert f"{name}.weight" in model.state_dict()


def widths_of_the_classifier(case):
    for _, head in heads(case.make()):
        names = ("in_features", "out_features") if hasattr(head, "in_features") else ("in_channels", "out_channels")
        assert getattr(head, names[1]) == CLASSES and getattr(head, names[0]) > CLASSES


def test_scripting_a_model_with_moments_says_what_to_do_instead():
    with pytest.raises(NotImplementedError, match="torch.export"):
        made_scriptable(Case("test_resnet", "moments"))


HABITS = listed(globals(), __name__)
LIMITS = {
    ("made_scriptable", "moments"): "TorchScript has no hooks",
    ("made_scriptable", "blocks"): "TorchScript has no type for a chart, which goes both ways",
    ("features_only_by_graph", "blocks"): "the graph is traced before blocks are put in",
    **{("classifier_by_the_name_of_its_weight", form): "its weights are called mu" for form in FORMS},
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(("habit", "case"), cases(HABITS, heavy=("made_exportable",)))
def test_habit(habit, case):
    parity(habit, case, LIMITS)
