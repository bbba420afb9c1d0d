"""From image and video files to tiles."""
