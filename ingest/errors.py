"""Every error of the data side. A message says what was expected, what was found, and what to do.

All of them pickle (Ray carries them between processes): the message is the only required argument.
"""

from __future__ import annotations


class IngestError(Exception):
    """Root of all errors that ingest raises on purpose."""


class ConfigError(IngestError, ValueError):
    """A setting that cannot work; raised when the configuration is built."""


class StoreError(IngestError):
    """A store could not do what was asked."""


class UnknownSchemeError(StoreError, ConfigError):
    """A URI whose scheme no store serves."""


class PlaceNotFoundError(StoreError):
    """The bucket or folder itself does not exist."""


class CredentialsError(StoreError):
    """No credentials were found, or they were refused (401)."""


class PermissionDeniedError(StoreError):
    """The credentials are good but lack a permission (403)."""


class UnreachableError(StoreError):
    """The store did not answer within the deadline: connection refused, reset, timed out, 429 or 5xx throughout."""


class DiskFullError(StoreError):
    """A disk or a quota is full. Trying again does not help.

    Attributes:
        place: the path that could not be written; None if it is not known.
        needed_bytes: room that is needed there; None if it is not known.
    """

    def __init__(self, message: str, place: str | None = None, needed_bytes: int | None = None) -> None:
        super().__init__(message, place, needed_bytes)
        self.place = place
        self.needed_bytes = needed_bytes

    def __str__(self) -> str:
        return str(self.args[0])


class ObjectError(StoreError):
    """One object is at fault, and the others may be well: what a quarantine may take."""


class ObjectNotFoundError(ObjectError):
    """A listed object is not there."""


class PreconditionError(ObjectError):
    """An object is not of the generation that a conditional write or delete requires."""


class StaleManifestError(ObjectError):
    """An object's size or generation is no longer what was listed."""


class CorruptObjectError(ObjectError):
    """An object's bytes do not match its listed length or checksum, after every retry."""


class EncodingError(ObjectError):
    """An object is stored with a Content-Encoding that is not read, e.g. br or zstd."""


class ListingError(StoreError):
    """A listing failed or could not be shown to be complete."""


class EmptyListingError(ListingError):
    """The place exists and holds no object."""


class PairingError(IngestError):
    """Images and labels do not pair one to one."""


class ManifestError(IngestError):
    """A saved manifest cannot be read, or is not one."""


class DecodeError(IngestError):
    """One case's bytes are not the volume that was expected.

    Attributes:
        reason: a short, stable code for reports, e.g. ``not-npy``, ``dtype``, ``shape-mismatch``.
    """

    def __init__(self, message: str, reason: str = "undecodable") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class BadCasesError(IngestError):
    """Some cases cannot be read, and the policy lets none of them be left out."""


class QuarantineBudgetError(IngestError):
    """More cases are bad than the run may leave out."""


class ClusterError(IngestError):
    """Ray could not be started here, or the cluster that RAY_ADDRESS names cannot be reached or refuses us."""


class MissingDependencyError(IngestError):
    """An optional dependency is needed and not installed."""
