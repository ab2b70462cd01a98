"""`Data` in, indexed images and batches of them out; the only room that imports TensorFlow."""
