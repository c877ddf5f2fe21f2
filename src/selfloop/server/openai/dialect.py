"""OpenAI's dialect, with vLLM's additions: the whole server, and each sampler below its ``base_url``."""

from collections.abc import Mapping

from selfloop.server.openai import wire
from selfloop.server.openai.errors import ERRORS
from selfloop.server.openai.routes import MOUNTS
from selfloop.server.shared.dialect import BaseUrl, Dialect

_PREFIX = "/oai/api"
_OF_SAMPLER = r"/loops/samplers/(?P<sampler_id>[^/]+)/(sync/)?"
_ROUTES = "(v1/.*|tokenize|detokenize|tokenizer_info)"


def _is_library(headers: Mapping[str, str]) -> bool:
    """Whether a library of OpenAI's, in any language, sends it. Those of Anthropic's have the header, too."""
    return "x-stainless-lang" in headers and "anthropic-version" not in headers


DIALECT = Dialect(
    name="openai",
    bases=f"{_PREFIX}/v1 and /loops/samplers/<id>/v1 (OpenAI)",
    routers=MOUNTS,
    patterns=(_OF_SAMPLER + _ROUTES, f"{_PREFIX}/{_ROUTES}"),
    errors=ERRORS,
    # Below a sampler only what is named: the rest spends compute.
    reads_below=(f"{_PREFIX}/",),
    read_only=(
        "GET /loops/samplers/{sampler_id}/v1/models",
        "GET /loops/samplers/{sampler_id}/v1/models/{model:path}",
        "GET /loops/samplers/{sampler_id}/tokenizer_info",
        "GET /loops/samplers/{sampler_id}/sync/v1/models",
        "GET /loops/samplers/{sampler_id}/sync/v1/models/{model:path}",
    ),
    base_url=BaseUrl(
        _PREFIX,
        frozenset(
            {
                "/v1/chat/completions",
                "/v1/completions",
                "/v1/responses",
                "/tokenize",
                "/detokenize",
                "/tokenizer_info",
            }
        ),
        shared="/v1/models",
        sent_by=_is_library,
    ),
    subjects=(_OF_SAMPLER + ".*",),
    schemas=wire.SCHEMAS,
)
