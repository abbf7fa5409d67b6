"""Every error DYNAMAX raises on purpose, in one tree.

    DynamaxError
    ├── UsageError                      an argument the caller can correct (also a ValueError)
    │   ├── UnsupportedModelError       no adapter for this model type
    │   ├── ExitPlacementError          exit layers that do not exist in this backbone
    │   ├── PolicyMismatchError         a state policy that this family or artifact does not allow
    │   └── PromiseError                a promise that is not recorded, or that nothing keeps
    ├── DataError                       text that cannot be read, decoded or used
    ├── BackboneError                   a model folder or hub id that cannot be loaded
    └── ArtifactError                   a saved set of exits that cannot be used
        ├── ArtifactCorruptError        truncated, malformed, NaN or wrongly shaped
        ├── ArtifactVersionError        written by a newer DYNAMAX
        └── ArtifactMismatchError       made for another backbone

Messages name the value, what is allowed, and the way out. The command line prints them on stderr and exits with 2.
"""

from __future__ import annotations


class DynamaxError(Exception):
    """Base of every error raised on purpose; anything else that escapes is a bug in DYNAMAX."""


class UsageError(DynamaxError, ValueError):
    """An argument the caller can correct."""


class UnsupportedModelError(UsageError):
    """No adapter drives this model type."""


class ExitPlacementError(UsageError):
    """Exit layers that do not exist in this backbone."""


class PolicyMismatchError(UsageError):
    """A state policy that this family of layers, or this artifact, does not allow."""


class PromiseError(UsageError):
    """A promise that is not recorded, or that nothing keeps."""


class DataError(DynamaxError):
    """Text that cannot be read, decoded or used."""


class BackboneError(DynamaxError):
    """A model folder or hub id that cannot be loaded."""


class ArtifactError(DynamaxError):
    """A saved set of exits that cannot be used."""


class ArtifactCorruptError(ArtifactError):
    """Truncated, malformed, NaN or wrongly shaped."""


class ArtifactVersionError(ArtifactError):
    """Written by a newer DYNAMAX."""


class ArtifactMismatchError(ArtifactError):
    """Made for another backbone."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, at most 200 characters, for use within a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".: ")
