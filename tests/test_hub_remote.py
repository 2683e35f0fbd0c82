"""Publishing and loading with the real client of the Hub, over HTTP, against a Hub on the loopback interface.

The client reads its settings when it is imported, so it runs in processes of its own; each runs a script of several
steps, because starting one takes seconds.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import PART_SIZE, LoopbackHub
from runs import TINY, make_images, train_tiny

from timm_faim.hub import save_model
from timm_faim.hub.entries import write_entry

REPO = "tester/faim_test_resnet.pets"
ROOT = Path(__file__).parents[1]
PREAMBLE = '''
import hashlib, json, sys
import timm, torch, timm_faim
from functools import partial; from timm_faim.commands import run_command; hub = partial(run_command, "hub")
from timm_faim.run.errors import UserError
torch.set_num_threads(1)

def attempt(*argv):
    """The message of a push that must fail, None of one that does not."""
    try:
        hub([str(word) for word in argv])
    except UserError as e:
        return str(e)

def opened(name, **options):
    """The message of a model that does not open, or its logits as a hash."""
    try:
        model = timm.create_model(name, pretrained=True, **options).eval()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    size = timm.data.resolve_model_data_config(model)["input_size"]
    with torch.inference_mode():
        return hashlib.sha256(model(torch.linspace(-2, 2, 2 * size[0] * size[1] * size[2]).reshape(2, *size))
                              .numpy().tobytes()).hexdigest()
'''


@pytest.fixture
def hub():
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a tiny training."""
    folder = tmp_path_factory.mktemp("run")
    return train_tiny(make_images(folder / "images"), folder, "--faim-cfg", "space=sphere", "margin=0.1")


@pytest.fixture
def client(hub, tmp_path):
    """Runs a script as a user of the hub, and returns what it assigns to `result`."""

    def call(script, home="home", **environment):
        process = start(script, home, **environment)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        for text in (output, errors):
            assert hub.token not in text and hub.read_token not in text
        return json.loads(output.splitlines()[-1])

    def start(script, home="home", **environment):
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": hub.token,
            "HF_HOME": str(tmp_path / home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        code = f"{PREAMBLE}\n{textwrap.dedent(script)}\nprint(json.dumps(result))"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **settings, **environment},
            cwd=tmp_path,
        )

    call.start = start
    return call


def logits_hash(name):
    """What `opened` of the scripts gives, in this process."""
    scope = {}
    exec(PREAMBLE, scope)
    threads = torch.get_num_threads()
    try:
        return scope["opened"](name)
    finally:
        torch.set_num_threads(threads)


def commits(hub, repo=REPO):
    """Messages of the commits on main, the first one of the hub itself left out."""
    found, sha = [], hub.repos[repo].branches["main"]
    while sha is not None:
        commit = hub.repos[repo].commits[sha]
        found.append(commit.message)
        sha = commit.parent
    return found[-2::-1]


def test_round_trip(hub, client, run, tmp_path):
    """Train, push, open in a new process: the same logits, bit for bit; pushed again, nothing happens."""
    push = f'"push", {str(run)!r}, "--repo", {REPO!r}, "--license", "mit"'
    assert client(f"result = [attempt({push}), attempt({push})]") == [None, None]
    assert commits(hub) == ["Add FAIM model"]
    files = hub.files(REPO)
    assert set(files) == {
        "README.md",
        "config.json",
        "learning_curve.png",
        "model.safetensors",
        "summary.csv",
        "metric.png",
        "train_args.yaml",
        ".gitattributes",
    }
    assert not [name for name in files if name.endswith((".bin", ".pkl", ".pt", ".pth"))]
    assert not hub.repos[REPO].private

    script = f"""
    name = "hf-hub:{REPO}"
    model = timm.create_model(name, pretrained=True, num_classes=5)
    result = [opened(name), opened(name + "@main"), model.num_classes, model.get_classifier().space,
              timm.create_model(name).pretrained_cfg["label_names"]]
    """
    expected = logits_hash(f"local-dir:{run}")
    assert client(script, home="another") == [expected, expected, 5, "sphere", ["bird", "cat", "dog"]]
    offline = client(f'result = [opened("hf-hub:{REPO}"), attempt({push})]', home="another", HF_HUB_OFFLINE="1")
    assert offline[0] == expected and "HF_HUB_OFFLINE is set. Unset it, or write the folder alone" in offline[1]
    refused = client(f'result = opened("hf-hub:{REPO}")', home="empty", HF_HUB_OFFLINE="1")
    assert "cannot find the requested files in the local cache" in refused
    for path in tmp_path.rglob("*"):  # of the caches too
        assert not path.is_file() or hub.token.encode() not in path.read_bytes()


def test_branch_tag_pull_request_and_private_repository(hub, client, run):
    script = f"""
    push = ["push", {str(run)!r}, "--repo", {REPO!r}]
    result = [attempt(*push, "--private", "--tag", "v1", "--message", "first"),
              attempt(*push, "--private", "--tag", "v1"),
              attempt(*push, "--branch", "trial", "--license", "mit"),
              attempt(*push, "--create-pr", "--license", "mit", "--message", "with a licence")]
    """
    first, again, branch, request = client(script)
    assert (first, branch, request) == (None, None, None)
    assert "which is published: there is a tag v1 already. Choose another --tag" in again
    repo = hub.repos[REPO]
    assert repo.private and commits(hub) == ["first"]
    assert repo.tags == {"v1": repo.branches["main"]}
    assert repo.branches["trial"] != repo.branches["main"]
    assert b"license: mit" in hub.files(REPO, "trial")["README.md"]
    assert b"license: mit" in hub.files(REPO, "refs/pr/1")["README.md"]
    assert b"license: mit" not in hub.files(REPO)["README.md"]
    pinned = repo.branches["main"]
    script = f"""
    result = [opened("hf-hub:{REPO}@{pinned}"), opened("hf-hub:{REPO}@{"0" * 40}")]
    """
    found = client(script, home="another")
    assert found[0] == logits_hash(f"local-dir:{run}")
    assert "RevisionNotFound" in found[1] or "not found" in found[1].lower()
    hidden = client(f'result = opened("hf-hub:{REPO}")', home="stranger", HF_TOKEN="")
    assert "RepositoryNotFound" in hidden or "401" in hidden


# What fails, with which status; what the message must say. Every push is to a repository of its own.
REFUSALS = [
    ("POST /api/repos/create", 401, r"cannot make the repository: the token is not valid (401). Run `hf auth login`"),
    ("POST /api/repos/create", 403, r"cannot make the repository: the token may not write there (403)"),
    ("POST /api/repos/create", 404, r"cannot make the repository: there is no such repository"),
    ("POST /api/repos/create", 503, r"cannot make the repository: the Hub answered 503. Push again later"),
    ("POST .*/preupload/", 401, r"cannot upload: the token is not valid (401)"),
    ("POST .*/preupload/", 403, r"cannot upload: the token may not write there (403)"),
    ("POST .*/preupload/", 404, r"cannot upload: there is no such repository"),
    ("POST .*/lfs/objects/batch", 401, r"cannot upload: the token is not valid (401)"),
    ("POST .*/lfs/objects/batch", 403, r"cannot upload: the token may not write there (403)"),
    ("POST .*/lfs/objects/batch", 404, r"cannot upload: there is no such repository"),
    ("PUT .*", 403, r" to the Hub (403). Push again: what is there is not resent"),
    ("PUT .*", 503, r" to the Hub (503). Push again: what is there is not resent"),
    ("POST .*/commit/", 401, r"cannot upload: the token is not valid (401)"),
    ("POST .*/commit/", 403, r"cannot upload: the token may not write there (403)"),
    ("POST .*/commit/", 404, r"cannot upload: there is no such repository"),
    ("POST .*/commit/", 409, r"cannot upload: another commit came first, 3 times (409). Push again"),
    ("POST .*/commit/", 412, r"cannot upload: another commit came first, 3 times (412). Push again"),
    ("POST .*/commit/", 503, r"cannot upload: the Hub answered 503. Push again later"),
]


PUSH_REFUSED = """
import time
from pathlib import Path
from timm_faim.hub import Release, build_package, push
time.sleep = lambda seconds: None  # the client waits longer and longer between its own tries of a 503
build_package(Path({run!r}), Path("package"), Release("tester/x"))
result = []
for number in range({count}):
    try:
        push(Path("package"), f"tester/refused{{number}}")
        result.append(None)
    except UserError as e:
        result.append(str(e))
"""


def test_every_refusal_is_one_clear_line_and_publishes_nothing(hub, client, run):
    """Each step answered with each status, in one process; nothing can be seen afterwards."""
    for number, (step, status, _) in enumerate(REFUSALS):
        # The creation names its repository in the body: those refusals come first, in this order.
        match = step if "create" in step else step.replace(".*", rf".*refused{number}\b.*", 1)
        hub.fail(match, status, times=60 if status in (409, 412, 503) and "create" not in step else 1)
    outcome = client(PUSH_REFUSED.format(run=str(run), count=len(REFUSALS)))
    for number, ((step, status, message), said) in enumerate(zip(REFUSALS, outcome, strict=True)):
        assert said and message in said and "\n" not in said, (step, status, said)
        repo = hub.repos.get(f"tester/refused{number}")
        assert repo is None or [c.message for c in repo.commits.values()] == ["initial commit"], (step, status)


def test_a_commit_that_another_one_has_overtaken_is_repeated(hub, client, run):
    hub.fail("POST .*/commit/", 412, times=2)
    assert client(f'result = attempt("push", {str(run)!r}, "--repo", {REPO!r})') is None
    assert commits(hub) == ["Add FAIM model"]


def test_a_broken_upload_goes_on_with_what_is_missing(hub, client, tmp_path):
    """More than 10 MiB, in parts. The first push loses its connection at the commit: nothing is sent a second time."""
    torch.manual_seed(0)
    save_model(timm.create_model("faim_resnet10t", num_classes=3), tmp_path / "big")
    assert (tmp_path / "big" / "model.safetensors").stat().st_size > 2 * PART_SIZE > 10 * 2**20 - 1
    hub.fail("POST .*/commit/", 403)
    push = f'attempt("push", {str(tmp_path / "big")!r}, "--repo", {REPO!r})'
    first = client(f"result = {push}")
    assert "may not write there" in first
    sent = [r for r in hub.requests if r.method == "PUT"]
    assert len(sent) > 2
    assert client(f"result = {push}") is None
    assert [r for r in hub.requests if r.method == "PUT"] == sent
    assert commits(hub) == ["Add FAIM model"]

    # And back again: a download that breaks after 11 MiB goes on from there, in the same call or in the next one.
    hub.fail("GET /storage/", 200, after_bytes=11 * 2**20)
    found = client(f'result = [opened("hf-hub:{REPO}"), opened("hf-hub:{REPO}")]')
    expected = logits_hash(f"local-dir:{tmp_path / 'big'}")
    assert found[1] == expected and (found[0] == expected or "broken" in found[0])
    assert 206 in [r.status for r in hub.requests if r.path.startswith("/storage/")]
    assert not any(r.has_authorization for r in hub.requests if r.path.startswith("/storage/"))  # another host


def test_two_pushes_at_once_leave_one_whole_model(hub, client, tmp_path):
    for seed in range(2):
        torch.manual_seed(seed)
        save_model(timm.create_model("faim_test_resnet", num_classes=3), tmp_path / f"model{seed}")
    scripts = [f'result = attempt("push", {str(tmp_path / f"model{n}")!r}, "--repo", {REPO!r})' for n in range(2)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda n: client(scripts[n], home=f"home{n}"), range(2))) == [None, None]
    expected = [logits_hash(f"local-dir:{tmp_path / f'model{n}'}") for n in range(2)]
    assert client(f'result = opened("hf-hub:{REPO}")') in expected
    assert len(commits(hub)) == 2


def test_entries_are_published_checked_and_opened_by_their_tag(hub, client, run, tmp_path):
    configs, runs = tmp_path / "configs", tmp_path / "runs"
    configs.mkdir(), runs.mkdir()
    name = "faim_test_resnet.pets"
    (runs / name).symlink_to(run)
    path = write_entry(run, configs, "pets", license="mit", dataset={"name": "Pets"})
    settings = {"TIMM_FAIM_HUB_CONFIGS": str(configs), "TIMM_FAIM_HUB_ORG": "tester"}
    assert client(f"result = hub(['push-all', {str(runs)!r}, '--folder', {str(configs)!r}])", **settings) == 0
    entry = yaml.safe_load(path.read_text())
    assert entry["revision"] == hub.repos[REPO].branches["main"] and len(entry["sha256"]) == 64

    script = f"result = [hub(['check']), opened({name!r}), {name!r} in timm.list_pretrained('faim_*')]"
    assert client(script, home="another", **settings) == [0, logits_hash(f"local-dir:{run}"), True]

    hub.corrupt(REPO, "model.safetensors")
    found = client(f"result = [hub(['check']), opened({name!r})]", home="third", **settings)
    assert found[0] == 1 and "has sha256" in found[1] and f"{name}.yaml says {entry['sha256']}" in found[1]

    changed = entry | {"probe_logits": [value + 1 for value in entry["probe_logits"]]}
    path.write_text(yaml.safe_dump(changed))
    assert client("result = hub(['check'])", home="another", **settings) == 1  # other logits than recorded


def test_training_publishes_its_run_at_the_end(hub, client, tmp_path):
    images = make_images(tmp_path / "images")
    argv = [
        "--data-dir",
        str(images),
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
        "--model",
        "faim_test_resnet",
        *TINY,
        "--push-to-hub",
        REPO,
        "--hub-private",
        "--hub-license",
        "mit",
    ]
    script = f"""
    from timm_faim.train import main

    def train(*more):
        try:
            main([*{argv!r}, *more], "train_faim.py")
        except SystemExit as e:
            return e.code
        return 0
    """
    assert client(f'{script}\n    result = [train("--stop-epoch", "1"), train("--resume", "auto")]') == [0, 0]
    assert commits(hub) == ["Add FAIM model"] and hub.repos[REPO].private  # once, and not after the first part
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert b"push_to_hub" not in hub.files(REPO)["train_args.yaml"]

    hub.fail("POST .*/commit/", 403)
    assert client(f'{script}\n    result = train("--experiment", "second")') == 1
    assert (tmp_path / "second" / "model_best.safetensors").is_file()
    assert len(commits(hub)) == 1


def test_the_folder_opens_in_transformers(hub, client, run):
    pytest.importorskip("transformers")
    client(f'result = attempt("push", {str(run)!r}, "--repo", {REPO!r})')
    script = f"""
    from PIL import Image
    from transformers import pipeline
    classify = pipeline("image-classification", model={REPO!r})
    answers = classify(Image.new("RGB", (32, 32), (200, 60, 60)))
    from transformers import AutoModelForImageClassification
    theirs = AutoModelForImageClassification.from_pretrained({REPO!r}).eval()
    ours = timm.create_model("hf-hub:{REPO}", pretrained=True).eval()
    images = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.inference_mode():
        same = torch.equal(theirs(pixel_values=images).logits, ours(images))
    result = [sorted(answer["label"] for answer in answers), same]
    """
    assert client(script) == [["bird", "cat", "dog"], True]
