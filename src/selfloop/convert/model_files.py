"""Which files of a hub's model are fetched, and in what order: those that tell whether it can be served come first."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from huggingface_hub.utils import httpx

from selfloop.convert.download import Downloads, RemoteFile
from selfloop.convert.reports import Report
from selfloop.types.errors import BadRequest
from selfloop.types.model_folder import CHAT_TEMPLATES_FOLDER, PUBLIC_FILES, check_config
from selfloop.types.model_weights import WEIGHTS_FILE, WEIGHTS_INDEX, weight_names

_SMALL = 0.02


def download_model(
    model: str,
    files: Sequence[RemoteFile],
    folder: Path,
    headers: Mapping[str, str],
    check: Callable[[httpx.Response], object],
    report: Report,
) -> None:
    """Fetch config, tokenizer and safetensors, of ``files`` that are all of the model's.

    Raises:
        BadRequest: not a model that can be served.
        OperationFailed: as :meth:`Downloads.fetch` does, and so on.
    """
    named = {file.name: file for file in files}
    if WEIGHTS_FILE not in named and WEIGHTS_INDEX not in named:
        raise BadRequest("base_model", f"{model} has no safetensors weights; pickled ones are never loaded")
    downloads = Downloads(folder, headers, check)
    downloads.fetch([file for file in files if _is_small(file.name)], report, (0.0, _SMALL))
    check_config(folder)
    downloads.fetch([named[name] for name in weight_names(folder, named)], report, (_SMALL, 0.99))
    downloads.close()


def may_be_needed(name: str) -> bool:
    """Whether a file of this name may be one that is fetched."""
    return _is_small(name) or name.endswith(".safetensors")


def _is_small(name: str) -> bool:
    place, _, file = name.rpartition("/")
    is_template = place == CHAT_TEMPLATES_FOLDER and file.endswith(".jinja")
    return name in PUBLIC_FILES or name == WEIGHTS_INDEX or is_template
