"""Classifiers in closed form from images: one pass through the backbone, features on disk, the rest in seconds."""
