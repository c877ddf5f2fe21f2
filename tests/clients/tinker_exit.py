"""How a process of the Tinker SDK may end."""

import signal


def ended_well(status: int) -> bool:
    """Threads of the SDK at times abort its interpreter at the very end, when all is done and written."""
    return status in (0, -signal.SIGABRT)
