"""A model version as files: write, verify, load, predict. Needs neither Ray nor MLflow."""

from shoal.models.lineage import Lineage
from shoal.models.package import ModelPackage, write_package
from shoal.models.tensors import load_tensors, save_tensors

__all__ = ["Lineage", "ModelPackage", "load_tensors", "save_tensors", "write_package"]
