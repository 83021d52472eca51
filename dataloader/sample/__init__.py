"""The sample data set: captioned drawings."""

from dataloader.sample.scenes import make_sample, make_test_images

__all__ = ["make_sample", "make_test_images"]
