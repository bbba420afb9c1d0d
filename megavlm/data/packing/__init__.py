"""The offline job that writes packs. Nothing else in the package imports it."""
