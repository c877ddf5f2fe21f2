"""The data plane of the Loops clients: operations of runs, samples of samplers."""

from selfloop.server.loops import sampler, trainer, wire
from selfloop.server.shared.dialect import Dialect, Mount
from selfloop.server.shared.errors import ErrorShape, final, reason_of
from selfloop.types.errors import NotReady, SelfloopError


class _LoopsErrors(ErrorShape):
    """The server's own shape. Whatever is final says so, and whatever passes is a 408.

    To these clients a 503 is the end of a server, a 429 that of the script, and a 408 a reason to ask again.
    """

    def status(self, error: SelfloopError, path: str) -> int:
        return 408 if isinstance(error, NotReady) else super().status(error, path)

    def headers(self, error: SelfloopError, path: str) -> dict[str, str]:
        headers = super().headers(error, path)
        is_final = not isinstance(error, NotReady) and self.status(error, path) < 500
        return headers | final(reason_of(error)) if is_final else headers

    def plain_headers(self, reason: str, path: str) -> dict[str, str]:
        return final(reason)


DIALECT = Dialect(
    name="loops",
    bases="/loops/runs and /loops/samplers (Loops)",
    routers=(Mount(trainer.router), Mount(sampler.router)),
    prefixes=("/loops/",),
    polls=(trainer.POLL, sampler.POLL),
    errors=_LoopsErrors(),
    # What is not named is a poll or a keepalive.
    reads_below=(),
    read_only=(
        "GET /loops/runs/{run_id}/policy_version",
        "GET /loops/samplers/{sampler_id}/trainers_policy_version",
    ),
    subjects=("/loops/runs/(?P<run_id>[^/]*)/.*", "/loops/samplers/(?P<sampler_id>[^/]*)/.*"),
    schemas=wire.SCHEMAS,
)
