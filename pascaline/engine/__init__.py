from pascaline.engine.engine import Engine, Stats
from pascaline.engine.request import Output, Request
from pascaline.engine.sampler import Sampling

__all__ = ["Engine", "Output", "Request", "Sampling", "Stats"]
