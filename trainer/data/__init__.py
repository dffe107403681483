"""From the store to batches on the device: which rows, read ahead, cached."""
