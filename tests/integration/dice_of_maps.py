"""Mean Dice of a folder of label maps against a folder of labels, by NumPy alone.

A script of its own, run by the test beside it, that knows nothing of voxflux: the mean over cases of the mean over
classes 1 and 2, each (2 |P and L| + 1e-6) / (|P| + |L| + 1e-6).
"""

import sys
from pathlib import Path

import numpy as np


def main(maps: Path, labels: Path) -> None:
    names = sorted(file.name for file in maps.glob("*.npy"))
    if not names or names != sorted(file.name for file in labels.glob("*.npy")):
        raise SystemExit(f"expected a label map of each label in {labels}, found {len(names)} in {maps}")
    scores = []
    for name in names:
        predicted, true = np.load(maps / name), np.load(labels / name)
        if predicted.shape != true.shape:
            raise SystemExit(f"{name}: expected a label map of {true.shape}, found {predicted.shape}")
        for value in (1, 2):
            both = int(((predicted == value) & (true == value)).sum())
            scores.append((2 * both + 1e-6) / (int((predicted == value).sum()) + int((true == value).sum()) + 1e-6))
    print(len(names), sum(scores) / len(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
