"""The training side of voxflux: a 3D U-Net on Ray Train."""
