"""What exits are worth: ``harness`` on tasks, ``bench`` by the clock, ``scan`` before training, ``compare`` on text."""
