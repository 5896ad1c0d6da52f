"""Running a stage: the torch-free parent, the worker, and the training loops."""
