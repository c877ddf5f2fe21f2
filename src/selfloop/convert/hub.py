"""Downloads a model of the Hugging Face hub: config first, so that a model nobody can serve costs nothing."""

import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # the HTTP library differs between its releases

from selfloop.convert.reports import Report
from selfloop.types.errors import BadRequest, Denied, NotFound, NotReady
from selfloop.types.model_folder import PUBLIC_FILES, check_config
from selfloop.types.model_weights import WEIGHTS_FILE, WEIGHTS_INDEX, weight_names

_PROGRESS_INTERVAL_S = 0.5


def download(repo_id: str, revision: str | None, folder: Path, report: Report) -> None:
    """Fetch tokenizer, config and safetensors of ``repo_id`` into ``folder``; what is there already stays.

    Raises:
        NotFound: no such model or revision.
        Denied: the model is gated and the hub's token does not open it.
        BadRequest: not a model that can be served.
        NotReady: the hub cannot be reached.
    """
    report("find", 0.0)
    try:
        _download(repo_id, revision, folder, report)
    except GatedRepoError as error:
        raise Denied(f"{repo_id} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise NotFound("revision", f"{repo_id}@{revision}") from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            "model", repo_id, "no such model on the hub, or it is private and HF_TOKEN is not set"
        ) from error
    except HFValidationError as error:
        raise BadRequest("base_model", str(error)) from error
    except (httpx.HTTPError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise NotReady(
            f"the model hub cannot be reached for {repo_id} ({type(error).__name__}: {error}). "
            "Without a network, serve a local folder or the embedded model.",
            retry_s=60,
        ) from error


def _download(repo_id: str, revision: str | None, folder: Path, report: Report) -> None:
    info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if WEIGHTS_FILE not in sizes and WEIGHTS_INDEX not in sizes:
        raise BadRequest("base_model", f"{repo_id} has no safetensors weights; pickled ones are never loaded")
    small = [name for name in sizes if name in PUBLIC_FILES or name == WEIGHTS_INDEX]
    snapshot_download(repo_id, revision=info.sha, local_dir=folder, allow_patterns=small)
    check_config(folder)
    weights = weight_names(folder, sizes)
    with _progress(folder, sum(sizes[name] for name in [*small, *weights]), report):
        snapshot_download(repo_id, revision=info.sha, local_dir=folder, allow_patterns=weights)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


@contextmanager
def _progress(folder: Path, total_bytes: int, report: Report) -> Generator[None, None, None]:
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(_PROGRESS_INTERVAL_S):
            report("download", min(_size_bytes(folder) / max(total_bytes, 1), 1.0) * 0.99)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stopped.set()
        watcher.join()


def _size_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # partial files are renamed under our eyes
            total += file.stat().st_size if file.is_file() else 0
    return total
