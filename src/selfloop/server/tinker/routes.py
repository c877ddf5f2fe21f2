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
)

router = APIRouter()
for _part in (service, training, custom_losses, sampling, futures, runs, checkpoints, sessions, account):
    router.include_router(_part.router)
