"""What a run measures: the metric table, its records on disk, their health, and the sinks they go to."""
