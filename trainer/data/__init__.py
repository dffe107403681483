"""From the store to batches on the device: plan, stream, cache."""
