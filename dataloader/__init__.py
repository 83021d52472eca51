"""Captioned images in, uint8 batches out."""
