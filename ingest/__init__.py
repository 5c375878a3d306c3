"""The data side of voxflux: from a bucket of paired volumes to fixed-shape batches, on Ray Data."""
