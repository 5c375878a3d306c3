"""Measures voxflux and its peers: `python -m benchmarks`."""
