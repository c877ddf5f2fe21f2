"""What the loss takes. The gateway imports this module, so it must not import torch."""

from selfloop.types.loss_spec import LossSpec

SPEC = LossSpec("focal", optional=("weights",), config={"gamma": 2.0})
