"""What is claimed of speed and quality, as commands that measure it."""
