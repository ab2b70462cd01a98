"""Restored and original images in, numbers and pictures of them out."""
