"""Trained models: load their weights, encode with them."""
