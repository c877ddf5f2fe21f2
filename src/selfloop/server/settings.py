"""One settings object for the gateway, made at the edge from flags and environment."""

import os
from dataclasses import dataclass
from pathlib import Path

from selfloop.control.control import ControlConfig


def default_data_dir() -> Path:
    return Path(os.environ.get("SELFLOOP_DATA_DIR", "~/.selfloop")).expanduser()


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``selfloop serve`` was told.

    Args:
        public_url: base of the URLs in answers, when a proxy hides the address that clients use.
        prepare: whether to prepare the embedded model at start, if its package is installed.
        serve_weights: whether ``/hf`` also gives out weight files.
    """

    host: str
    port: int
    data_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    public_url: str | None = None
    serve_weights: bool = False
    prepare: bool = True

    @property
    def control(self) -> ControlConfig:
        return ControlConfig(self.data_dir, self.device, self.dtype, self.prepare)
