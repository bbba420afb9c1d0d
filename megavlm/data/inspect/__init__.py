"""What packs hold, as figures and images."""
