"""Who may read a checkpoint: its team, everybody once it is published, and who shows a key of its team."""

from selfloop.types.resources import Checkpoint


def may_read(row: Checkpoint, team_id: str, granted_team_id: str | None = None) -> bool:
    """Whether ``team_id`` may; ``granted_team_id`` is another team, of which the caller holds a key."""
    return row.public or row.team_id in (team_id, granted_team_id)
