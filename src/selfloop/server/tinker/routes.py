"""All routes of the dialect."""

from fastapi import APIRouter

from selfloop.server.tinker import (
    account,
    checkpoints,
    custom_losses,
    futures,
    runs,
    sampling,
    service,
    sessions,
    training,
    uploads,
)

router = APIRouter()
router.include_router(uploads.public)
router.include_router(service.router)
router.include_router(training.router)
router.include_router(training.operations)
for _part in (custom_losses, sampling, futures, runs, checkpoints, uploads, sessions, account):
    router.include_router(_part.router)
