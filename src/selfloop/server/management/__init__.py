"""The management API: sessions, runs, samplers, deployments, checkpoints, as the hosted API has them."""
