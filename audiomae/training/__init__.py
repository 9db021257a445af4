"""Training: configuration, ranks, optimiser and schedule, the loop, its state on disk, log and pictures."""
