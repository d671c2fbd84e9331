"""The trainer and its parts: projections, taps and losses, checkpoints and restarts, precision, sharding, and what watches while it runs."""
