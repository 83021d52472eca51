"""Captioned images: from files, shards or streams to batches."""
