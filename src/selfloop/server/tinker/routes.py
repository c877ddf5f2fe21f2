"""All routes of the dialect."""

from fastapi import APIRouter

from selfloop.server.tinker import futures, sampling, service, training

router = APIRouter()
for _part in (service, training, sampling, futures):
    router.include_router(_part.router)
