"""Training: loss, optimizer, schedule and parallel execution; `run` holds what surrounds the loop."""
