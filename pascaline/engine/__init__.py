from pascaline.engine.engine import Engine
from pascaline.engine.request import Output, Request
from pascaline.engine.sampler import Sampling
from pascaline.engine.stats import Stats

__all__ = ["Engine", "Output", "Request", "Sampling", "Stats"]
