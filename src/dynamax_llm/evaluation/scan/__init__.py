"""What exits would save on a model, estimated before any training."""
