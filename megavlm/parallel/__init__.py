"""Process groups, devices and the layout of the layers over ranks."""
