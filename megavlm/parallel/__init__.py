"""Run-time parallelism: backend, process groups, point-to-point, context and vision parallelism."""
