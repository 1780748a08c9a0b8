"""What can go wrong while exporting::

StainDiffuserError
├── UsageError
│   └── ExportUsageError       2  a precision, target or option that does not exist
├── InputError
│   ├── GraphsError            4  a graphs folder or checkpoint that is missing or unreadable
│   └── BuildError             4  a graph that the target's compiler refuses
├── VerificationError
│   ├── ManifestError          5  files and manifest do not match
│   └── ParityError            5  an engine's outputs are too far from the golden samples
└── DependencyError
    └── BuilderMissingError    6  the builder of a target is not installed
"""

from staindiffuser.errors import DependencyError, InputError, UsageError, VerificationError

__all__ = ["BuildError", "BuilderMissingError", "ExportUsageError", "GraphsError", "ManifestError", "ParityError"]


class ExportUsageError(UsageError):
    """A precision, target or option that does not exist, or does not fit the others."""


class GraphsError(InputError):
    """A graphs folder or a checkpoint is missing, incomplete or unreadable."""


class BuildError(InputError):
    """A graph that the target's compiler refuses or cannot compile."""


class ManifestError(VerificationError):
    """The files of a graphs folder or a model repository do not match their manifest."""


class ParityError(VerificationError):
    """An engine's outputs differ from the golden samples by more than the gate allows."""


class UngatedError(VerificationError):
    """The graphs come from a checkpoint whose gate was not passed."""


class BuilderMissingError(DependencyError):
    """The builder of a target (TensorRT, ONNX Runtime, …) is not installed."""
