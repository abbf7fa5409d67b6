"""Quality, agreement, depth, cost and time of exits on the tasks of lm-evaluation-harness."""
