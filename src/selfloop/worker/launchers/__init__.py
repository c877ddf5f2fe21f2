"""Where workers run: on this machine, as forks of a process that holds the base model."""
