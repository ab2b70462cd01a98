"""`(B, H, W, C)` images to restored images."""
