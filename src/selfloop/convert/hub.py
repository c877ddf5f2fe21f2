"""Downloads a model of the Hugging Face hub: config first, so that a model nobody can serve costs nothing."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

from selfloop.convert.download import RemoteFile
from selfloop.convert.model_files import download_model, may_be_needed
from selfloop.convert.reports import Report
from selfloop.types.errors import BadRequest, Denied, NotFound, NotReady

_SHA256 = re.compile("[0-9a-f]{64}")


def download(repo_id: str, revision: str | None, endpoint: str | None, folder: Path, report: Report) -> None:
    """Fetch tokenizer, config and safetensors of ``repo_id`` into ``folder``; what is there already stays.

    Args:
        endpoint: of the hub; None is that of ``HF_ENDPOINT``, or else of Hugging Face.

    Raises:
        NotFound: no such model or revision.
        Denied: the model is gated and the hub's token does not open it.
        BadRequest: not a model that can be served.
        OperationFailed: what came is not what the hub says, or the disk has no room.
        NotReady: the hub cannot be reached.
    """
    report("find", 0.0)
    try:
        files = _files(repo_id, revision, endpoint)
        download_model(repo_id, files, folder, build_hf_headers(), hf_raise_for_status, report)
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


def _files(repo_id: str, revision: str | None, endpoint: str | None) -> list[RemoteFile]:
    """Of one commit: a branch may move while its files come."""
    info = HfApi(endpoint=endpoint).model_info(repo_id, revision=revision, files_metadata=True)
    found: list[RemoteFile] = []
    for file in info.siblings or ():
        if not may_be_needed(file.rfilename):
            continue
        url = hf_hub_url(repo_id, file.rfilename, revision=info.sha, endpoint=endpoint)
        if file.size is None:
            found.append(_asked(file.rfilename, url))
            continue
        sha256 = None if file.lfs is None else file.lfs.sha256
        # What mirrors have as a small file's id is not always git's, but stands for its content.
        version = f"{file.blob_id or info.sha}/{file.size}"
        found.append(RemoteFile(file.rfilename, url, file.size, version, sha256))
    return found


def _asked(name: str, url: str) -> RemoteFile:
    """Of a mirror that lists names alone: what it answers to HEAD."""
    told = get_hf_file_metadata(url)
    if told.size is None or told.etag is None:
        raise NotReady(f"the model hub does not say the size of {name}", retry_s=60)
    # The hub's tag of a large file is its digest.
    sha256 = told.etag if _SHA256.fullmatch(told.etag) else None
    return RemoteFile(name, url, told.size, f"{told.etag}/{told.size}", sha256)
