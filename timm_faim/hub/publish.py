"""Publish a run: build the folder, then one commit."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm_faim.hub.package import Release, build_package
from timm_faim.hub.upload import push
from timm_faim.run.errors import RankError, UserError


def publish(run: Path, release: Release, **options: Any) -> tuple[str, str]:
    """`build_package` in a temporary folder and `push` with its options; address and hash of the commit."""
    with tempfile.TemporaryDirectory() as work:
        package = Path(work, "package")
        build_package(run, package, release)
        return push(package, release.repo_id, **options)


def publish_run(run: Path, repo_id: str, license: str | None, private: bool, log: Callable) -> None:
    """Publish the run of a training that has ended; for its main process, once no other one waits for it.

    Raises:
        RankError: it is not published; the run is whole, and the message says how to publish it later.
    """
    try:
        url, _ = publish(run, Release(repo_id, license), private=private or None)
    except UserError as e:
        again = f"timm-faim hub push {run} --repo {repo_id}"
        raise RankError(f"the run in {run} is complete, but not published: {e}. Later: {again}") from e
    log(f"published: {url}")
