"""Data sets. Each has `labels`, `batches(index_batches, epoch)`, `to(device)`, `record()` and a length."""
