"""What a purge did."""

from typing import NamedTuple


class Purged(NamedTuple):
    """How many rows were changed, and the blobs that they had."""

    num_rows: int
    blob_keys: list[str]
