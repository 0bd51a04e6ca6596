"""What a run is made of: configuration, state, steps, loop, checkpoints."""
