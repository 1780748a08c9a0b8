"""StainDiffuser: virtual immunohistochemistry from H&E, for research use only.

Training (:mod:`staindiffuser.training`), export (:mod:`staindiffuser.export`), serving
(:mod:`staindiffuser.serving`) and the client (:mod:`staindiffuser.client`) are separate packages: the client and the
server never import torch.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
