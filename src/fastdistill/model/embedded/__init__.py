"""The embedded teacher: a small language model that ships with the package and runs on numpy alone."""
