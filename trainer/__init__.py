"""CARE Trainer: pretraining of rotation-equivariant vision backbones on any number of GPUs."""

__version__ = "0.1.0"
