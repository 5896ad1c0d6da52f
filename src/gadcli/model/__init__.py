"""What a worker computes: packed forward passes, log-probs and updates of actor and critic."""
