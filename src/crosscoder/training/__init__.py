"""Training: configuration, losses, schedules, dead latents, the loop, checkpoints and sinks."""
