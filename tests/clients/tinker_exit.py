"""How a process of the Tinker SDK may end."""

import signal


def ended_well(status: int) -> bool:
    """Threads of the SDK at times abort its interpreter at the very end, when all is done and written.

    The report of that which Python then writes can itself end in a bus error.
    """
    return status in (0, -signal.SIGABRT, -signal.SIGBUS)
