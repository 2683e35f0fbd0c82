"""Images: which there are, read with their own range, and shown."""
