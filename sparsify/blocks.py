"""`BlockView` where scripts found it before `sparsify.model` was a package."""

from sparsify.model.blocks import BlockView

__all__ = ["BlockView"]
