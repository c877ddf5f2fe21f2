"""What happened and what it took: log lines, metrics, traces, usage, and the archive to send a maintainer."""
