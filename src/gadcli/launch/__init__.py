"""Before and around the workers: preparing a run, starting, watching and ending its processes. No torch."""
