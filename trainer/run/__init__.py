"""What surrounds the training loop: flags, output folder, log, checkpoints, meters, validation, stop signals."""
