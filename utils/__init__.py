"""Shared helpers; they import none of our packages."""
