"""Packed images: tar shards, pixel caches and streams."""
