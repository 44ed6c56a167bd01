"""What an engine has done, and how it stands."""

from dataclasses import dataclass


@dataclass
class Stats:
    """Counts over the engine's life, and how it stands now (running, waiting, blocks_used; step_seconds: the last step's)."""

    steps: int = 0
    prefilled: int = 0  # prompt tokens computed
    generated: int = 0
    prefix_queries: int = 0  # prompt tokens looked up ...
    prefix_hits: int = 0  # ... and found
    preemptions: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_used: int = 0
    step_seconds: float = 0.0
