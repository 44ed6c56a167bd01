from pascaline.engine.engine import Engine, Output
from pascaline.engine.sampler import Sampling

__all__ = ["Engine", "Output", "Sampling"]
