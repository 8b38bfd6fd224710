"""Run a detector on images, videos and cameras."""
