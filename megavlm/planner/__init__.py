"""FLOPs, memory, communication and layouts, without torch; it imports config alone."""
