"""KiTS19's preprocessing against NumPy and SciPy, line by line from FACTS section 4; no torch, no code of ours.

`tests/prepare/test_kits19.py` holds the same formulas against torch's interpolation; here the grid itself is written
down, in float64.
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.ndimage

from ingest.prepare import PrepareConfig, prepare

TARGET = (1.6, 1.2, 1.2)
# Of each the shape, the spacing in mm, and the shape that the formula's int() gives at TARGET.
CASES = {
    "odd spacings": ((13, 23, 19), (2.9, 0.83, 0.71), (23, 15, 11)),
    "just below a whole number": ((9, 13, 17), (3.0, 1.1, 2.05), (16, 11, 29)),  # 16.875, 11.917, 29.04
    "one axis enlarged, one as it is, one shrunk": ((7, 18, 33), (4.1, 1.2, 0.41), (17, 18, 11)),
    # 0.9 / 1.2 * 16 is 12, but not with the header's float32; 0.6 / 1.2 * 20 stays 10.
    "just below a whole number by the header's rounding": ((11, 16, 20), (3.2, 0.9, 0.6), (22, 11, 10)),
    "no resampling": ((12, 10, 21), TARGET, (12, 10, 21)),
}
LEAST = (20, 17, 24)


def transcription(image: np.ndarray, label: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    spacing = [float(np.float32(s)) for s in spacing]  # a NIfTI header holds float32
    shape = [int(s / t * n) for s, t, n in zip(spacing, TARGET, image.shape, strict=True)]
    if tuple(np.float32(spacing)) == tuple(np.float32(TARGET)):
        shape = list(image.shape)
    aligned = [np.linspace(0, n - 1, wanted) for n, wanted in zip(image.shape, shape, strict=True)]
    x = scipy.ndimage.map_coordinates(image.astype(np.float64), np.meshgrid(*aligned, indexing="ij"), order=1)
    nearest = [[i * n // wanted for i in range(wanted)] for n, wanted in zip(label.shape, shape, strict=True)]
    y = label[np.ix_(*nearest)]
    x = (np.minimum(np.maximum(x, -79.0), 304.0) - 101.0) / 76.9
    for axis, least in enumerate(LEAST):
        lack = max(0, least - x.shape[axis])
        order = [0] * (lack // 2) + list(range(x.shape[axis])) + [x.shape[axis] - 1] * (lack - lack // 2)
        x, y = x.take(order, axis), y.take(order, axis)
    return x, y


@pytest.mark.parametrize("name", list(CASES))
def test_a_case_equals_the_transcription(tmp_path: Path, name: str) -> None:
    shape, spacing, resampled = CASES[name]
    rng = np.random.default_rng(len(name))
    image = rng.normal(60, 250, shape).astype(np.float32)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    folder = tmp_path / "in" / "case_00000"
    folder.mkdir(parents=True)
    for array, file in ((image, "imaging.nii.gz"), (label, "segmentation.nii.gz")):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), folder / file)
    settings = {
        "source": "kits19",
        "input": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "workers": 0,
        "resample": "mlperf",
    }
    prepare(PrepareConfig(**settings, spacing=TARGET, shape=LEAST))
    x = np.load(tmp_path / "out" / "images" / "case_00000_x.npy", allow_pickle=False)
    y = np.load(tmp_path / "out" / "labels" / "case_00000_y.npy", allow_pickle=False)
    expected_x, expected_y = transcription(image, label, spacing)
    padded = tuple(max(n, least) for n, least in zip(resampled, LEAST, strict=True))
    assert x.shape == y.shape == (1, *padded) == (1, *expected_x.shape)
    assert (x.dtype, y.dtype) == (np.float32, np.uint8)
    # Linear weights are float32 arithmetic, as in torch: 1e-5 of one window of intensities, not of each value.
    np.testing.assert_allclose(x[0], expected_x, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(y[0], expected_y)
