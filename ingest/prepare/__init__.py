"""Makes the paired .npy cases that training reads, out of KiTS19 or of the MNI152 template."""

from .case import case_id, original_case_id
from .run import PrepareConfig, PrepareResult, prepare

__all__ = ["PrepareConfig", "PrepareResult", "case_id", "original_case_id", "prepare"]
