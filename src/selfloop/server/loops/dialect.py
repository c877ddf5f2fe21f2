"""The data plane of the Loops clients: operations of runs, samples of samplers."""

from selfloop.server.loops import sampler, trainer, wire
from selfloop.server.loops.errors import ERRORS
from selfloop.server.shared.dialect import Dialect, Mount

DIALECT = Dialect(
    name="loops",
    bases="/loops/runs and /loops/samplers (Loops)",
    routers=(Mount(trainer.router), Mount(sampler.router)),
    prefixes=("/loops/",),
    polls=(trainer.POLL, sampler.POLL),
    errors=ERRORS,
    # What is not named is a poll or a keepalive.
    reads_below=(),
    read_only=(
        "GET /loops/runs/{run_id}/policy_version",
        "GET /loops/samplers/{sampler_id}/trainers_policy_version",
    ),
    subjects=("/loops/runs/(?P<run_id>[^/]*)/.*", "/loops/samplers/(?P<sampler_id>[^/]*)/.*"),
    schemas=wire.SCHEMAS,
)
