"""What voxflux is measured against: each peer reads the same pairs and applies the same transforms."""
