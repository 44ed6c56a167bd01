"""The tables of a recipe: what each stage and each part of a run may be told. Every key has a type and a default.

The recipe that holds them: pascaline/recipe.py.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Table(BaseModel):
    # strict: "50" and true are no numbers; no infinities: they have no JSON form
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Corpus(Table):
    """Real text. sources: "stdlib" (Python's own standard library), files or directories; max_bytes: at most so much of it is read.

    filters: tables [corpus.filters.NAME], run in their order, with the thresholds to change (docs/data.md); dedup: equal texts, or nearly
    equal ones too; decontaminate: files of evaluation texts that must not occur.

    mixture: weights of sources (1 for one that is not named): max_bytes is then what the cleaned texts have in these shares, each text
    at most max_repeats times. processes: that run the filters; 0: one for each core, 1: none but the program's own. held_out: share of
    the documents, drawn by their hash, that no stage trains on."""

    sources: list[str] = ["stdlib"]
    max_bytes: int = Field(4_000_000, ge=0)
    mixture: dict[str, Annotated[float, Field(gt=0)]] = {}
    max_repeats: float = Field(1.0, ge=1)
    processes: int = Field(0, ge=0)
    filters: dict[str, dict[str, Any]] = {}
    dedup: Literal["none", "exact", "minhash"] = "none"
    decontaminate: list[str] = []
    held_out: float = Field(0.0, ge=0, lt=1)


class Puzzle(Table):
    """One family of problems. traces: worked traces in the corpus; examples: chats in sft; dials: difficulty; quality: how the traces
    are written. Both are the puzzle's own: the LEVELS and the arguments of `trace` in its file.

    file: take the problems from this .jsonl file instead (docs/verifiers.md); test: another of held-out ones; verifier: who judges the
    answers, if not the puzzle itself; columns: what each problem has for the verifier beside its own columns."""

    traces: int = Field(0, ge=0)
    examples: int = Field(0, ge=0)
    dials: dict[str, Any] = {}
    quality: dict[str, Any] = {}
    file: str | None = None
    test: str | None = None
    verifier: str = ""
    columns: dict[str, Any] = {}


class Tokenizer(Table):
    vocab_size: int = Field(1024, ge=1)


class Optim(Table):
    """The optimizer and its schedule. muon: for the layers' matrices, AdamW for the rest. qk_clip: tau, the largest attention logit that
    is left alone (Kimi K2: 100), 0 for none. warmup in steps; decay: last share of the steps in which wsd falls; final: end over
    peak rate."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    momentum: float = Field(0.95, ge=0, lt=1)
    lr: float = Field(1e-3, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)
    qk_clip: float = Field(0.0, ge=0)
    warmup: int = Field(20, ge=0)
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    decay: float = Field(0.2, ge=0, le=1)
    final: float = Field(0.1, ge=0, le=1)


class Guard(Table):
    """What to do when a run goes wrong (docs/stability.md). sigma: a loss or gradient norm so many robust deviations above the last
    `window` steps is skipped, 0 for never; what is not finite always is, and max_skips such steps in a row stop the run; margin and
    patience: a smoothed loss that stays so much above its best for so many steps is rewound, patience 0 for never; rewinds: at most."""

    sigma: float = Field(6.0, ge=0)
    window: int = Field(128, ge=64)
    max_skips: int = Field(10, ge=1)
    margin: float = Field(0.3, gt=0)
    patience: int = Field(50, ge=0)
    rewinds: int = Field(3, ge=0)


class Stage(Optim):
    """What every training stage has. start: the earlier stage whose model it starts from, if not the one before; sequence_length: tokens
    a row (in rl a longer answer gets longer rows);
    tokens_per_step: tokens in one optimizer step, cut into micro-batches of at most micro_tokens; activation_checkpointing: compute
    each layer again in the backward instead of keeping its activations; compile: each layer by torch.compile; fp8: the layers' linear
    modules in block-scaled fp8 (docs/training.md).

    balance_rate: gamma of the router bias, until that share of the steps, then 0; sequence_balance: weight of the sequence-wise balance
    loss; mtp: weight of the multi-token loss until that share, then mtp_final; z_loss: weight of the squared log-partition of the head.
    save_every: steps between checkpoints; keep_last: how many of them stay; keep_every: one stays for good every so many steps."""

    start: str = ""
    sequence_length: int = Field(256, ge=8)
    micro_tokens: int = Field(8192, ge=8)
    activation_checkpointing: bool = False
    compile: bool = False
    fp8: bool = False
    balance_rate: float = Field(1e-3, ge=0)
    balance_until: float = Field(1.0, ge=0, le=1)
    sequence_balance: float = Field(0.0, ge=0)
    mtp: float = Field(0.3, ge=0)
    mtp_until: float = Field(1.0, ge=0, le=1)
    mtp_final: float = Field(0.1, ge=0)
    z_loss: float = Field(0.0, ge=0)
    save_every: int = Field(100, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    guard: Guard = Guard()


class Pretrain(Stage):
    """model: a shape of its own in place of the recipe's, a preset or any family's, drawn anew (a student's: [pretrain-student]).

    ramp_from: tokens a step at the start, growing in a straight line to tokens_per_step over the first `ramp_until` of the tokens."""

    model: dict[str, Any] = {}
    tokens: int = Field(1_000_000, ge=1)
    tokens_per_step: int = Field(4096, ge=8)
    ramp_from: int = Field(0, ge=0)
    ramp_until: float = Field(0.0, ge=0, le=1)


class Extend(Stage):
    """Context extension by YaRN. length: positions of the model from here on; sequence_length: tokens a row, 0 for as many; shortest:
    documents of fewer tokens are left out, for they say nothing about far positions.

    Before and after, the loss by position is measured on `documents` held-out texts, and recall on `needles` needles for each length
    and depth (0: none)."""

    length: int = Field(ge=8)
    sequence_length: int = Field(0, ge=0)
    shortest: int = Field(0, ge=0)
    tokens: int = Field(1_000_000, ge=1)
    tokens_per_step: int = Field(8192, ge=8)
    documents: int = Field(64, ge=1)
    needles: int = Field(20, ge=0)


class Sft(Stage):
    """Chats (docs/post-training.md). data: .jsonl files of them, or earlier stages that wrote some; examples: the puzzles' own too;
    puzzles: whose examples, none named: all; roles: whose words are learnt. epochs: how often each chat is seen; tokens: how many are read,
    padding included, in place of epochs if it is not 0. A chat of more than sequence_length tokens is left out and named in data.json,
    never cut. environment: what the examples are played in, with calls and results, as in rl ("": as the stage before, "none": in none).
    confessions: so many times the number of the puzzles' examples, chats that end with a report on the answer, for rl.confession to
    start from."""

    data: list[str] = []
    examples: bool = True
    puzzles: list[str] = []
    environment: str = ""
    confessions: float = Field(0.0, ge=0)
    roles: list[Literal["assistant", "user", "system", "tool"]] = Field(["assistant"], min_length=1)
    tokens_per_step: int = Field(4096, ge=8)
    epochs: float = Field(1.0, gt=0)
    tokens: int = Field(0, ge=0)


# What the papers do differently, by name: a key that the recipe gives itself is the recipe's.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"average": "answer", "clip_high": 0.2, "kl": 0.001},  # DeepSeekMath, arXiv 2402.03300; kl as in R1, arXiv 2501.12948
    "dr_grpo": {"advantage": "mean", "average": "limit", "clip_high": 0.2},  # arXiv 2503.20783
    "dapo": {"refills": 3, "overlong": 0.2},  # arXiv 2503.14476
    "gspo": {"average": "answer", "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},  # arXiv 2507.18071
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0},  # arXiv 2506.13585; the bounds are TRL's: 0 to 5
    "rloo": {"advantage": "others", "average": "limit"},  # arXiv 2402.14740
}


class Confession(Table):
    """Honest self-report in rl (docs/post-training.md): after a finished answer the model is asked whether it is right. share: of a step's
    problems, whose answers are asked about; max_tokens: of a report; weight: of the reports' loss beside the task's."""

    weight: float = Field(1.0, gt=0)
    share: float = Field(0.25, gt=0, le=1)
    max_tokens: int = Field(8, ge=1)


Alarm = Literal["entropy", "length", "flat", "unjudged", "gap"]


class Alarms(Table):
    """What is named on screen when a stage of reinforcement goes wrong (docs/post-training.md). stop: which of them end the run too, or all
    (true). All look at the last `window` steps.

    entropy: less than this share of its mean in the first `window` steps; length: answers longer on average than this share of max_tokens
    and getting longer, or more than a share `truncated` of them cut off; flat: so many steps in a row in which no group had variance, 0 for
    never; unjudged: more than this share without a verdict; gap: a token whose log-probability in the trainer is so far from the engine's,
    0 for 1e-4 in float32 and 1 in bfloat16."""

    stop: bool | list[Alarm] = False
    window: int = Field(10, ge=1)
    entropy: float = Field(0.1, ge=0, le=1)
    length: float = Field(0.9, gt=0, le=1)
    truncated: float = Field(0.3, ge=0, le=1)
    flat: int = Field(10, ge=0)
    unjudged: float = Field(0.02, ge=0, le=1)
    gap: float = Field(0.0, ge=0)


class Rl(Stage):
    """Group-relative policy optimisation. Each of `steps` rollouts samples `samples` answers to each of `prompts` problems of `puzzles`;
    wrong_reward is what a false claim earns (right earns 1, giving up 0); rewards: verifiers whose score is added, times this weight, or an
    earlier stage's reward model, for which it is the probability that the answer is better than its group's average. An answer that could
    not be judged is left out of its group; more than a share max_unjudged of them in a rollout stops the run. alarms: other trouble.

    minibatches, epochs: a rollout's answers are shuffled and cut into so many minibatches, each of which makes an optimizer step, and gone
    over so many times; warmup, save_every and the like count optimizer steps, reference_every rollouts.

    algorithm: a paper's name, which sets the keys that follow (docs/training.md). advantage: reward less the group's mean, over its
    deviation ("std") or not ("mean"), or less the mean of the other answers ("others"). average: over all tokens, over each answer's first
    ("answer"), or tokens over max_tokens ("limit"). ratio, surrogate, clip_low, clip_high, kl, unbiased: pascaline/train/policy.py.
    reference_every: rollouts after which the policy becomes the reference of kl, 0: never. refills: times that groups without variance are
    replaced by new ones; overlong: last share of max_tokens in which length costs, up to 1.

    plain: the problems as the corpus writes them, without chat tokens: RL straight from a base model, as R1-Zero's.

    environment: what the model acts in over several turns, as "calculator", "python" or module:function (docs/post-training.md); max_tokens
    is then for all turns together. "": that of the stage before, if it has one; "none": the model answers at once.

    tis: cap of the weight trainer over engine that each token's loss is multiplied by, 0: no weight; mask_low, mask_high: a token with a
    weight outside of them teaches nothing, 0: no such end; stale: an answer with a negative advantage whose tokens have become less
    probable by more than so many nats, in their mean, teaches nothing, 0: all do. replay: the experts that the engine used for a token
    are used in the optimizer steps too; watch_routing: only tell how many the routers would choose otherwise.

    mtp, mtp_until and mtp_final: the MTP modules, if the model has any, learn the sampled tokens by themselves, so that their drafts
    keep up with the policy; 0 leaves them as they are. confession: a table [rl.confession], if the model is to report on its answers."""

    puzzles: list[str] = ["countdown"]
    steps: int = Field(60, ge=1)
    prompts: int = Field(32, ge=1)
    samples: int = Field(16, ge=2)
    max_tokens: int = Field(200, ge=1)
    environment: str = ""
    minibatches: int = Field(1, ge=1)
    epochs: int = Field(1, ge=1)
    algorithm: Literal["", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"] = ""
    advantage: Literal["std", "mean", "others"] = "std"
    average: Literal["token", "answer", "limit"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo"] = "clip"
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.28, gt=0)
    kl: float = Field(0.0, ge=0)
    unbiased: bool = False
    reference_every: int = Field(0, ge=0)
    tis: float = Field(0.0, ge=0)
    mask_low: float = Field(0.0, ge=0, lt=1)
    mask_high: float = Field(0.0, ge=0)
    stale: float = Field(0.0, ge=0)
    replay: bool = False
    watch_routing: bool = False
    refills: int = Field(0, ge=0)
    overlong: float = Field(0.0, ge=0, lt=1)
    wrong_reward: float = Field(0.0, le=0)
    rewards: dict[str, float] = {}
    max_unjudged: float = Field(0.1, ge=0, le=1)
    plain: bool = False
    confession: Confession | None = None
    alarms: Alarms = Alarms()
    guard: Guard = Guard(sigma=0.0, patience=0)  # a policy's loss and norm jump about in good health

    @model_validator(mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        algorithm = raw.get("algorithm") if isinstance(raw, dict) else None
        return {**ALGORITHMS.get(algorithm, {}), **raw} if isinstance(algorithm, str) else raw

    @field_validator("tis", "mask_high")
    @classmethod
    def _leaves_equal_ones(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("must be 0 or more than 1, the weight where trainer and engine agree")
        return value


class Prefer(Stage):
    """Learning from pairs of answers, of which one is better. method: what the margin between them teaches: "sigmoid" (DPO, arXiv
    2305.18290), "ipo" (arXiv 2310.12036), "norm" (DPO on log-probabilities per token, of Tulu 3, arXiv 2411.15124), all with `beta`
    (0.1; with "norm" Tulu's 5); or "reward", a Bradley-Terry reward model: a head on the same trunk, saved beside it
    (docs/post-training.md). MTP modules stay as they are.

    data: files of pairs, or earlier stages that wrote some; held_out: share of the prompts, by their hash, on whose pairs accuracy and
    calibration are measured."""

    method: Literal["sigmoid", "ipo", "norm", "reward"] = "sigmoid"
    data: list[str] = []
    beta: float = Field(0.1, gt=0)
    held_out: float = Field(0.1, gt=0, lt=1)
    tokens_per_step: int = Field(4096, ge=8)
    epochs: float = Field(1.0, gt=0)
    lr: float = Field(1e-4, gt=0)
    guard: Guard = Guard(sigma=0.0, patience=0)  # a margin's gradient comes and goes in good health

    @model_validator(mode="before")
    @classmethod
    def _scaled(cls, raw: Any) -> Any:
        return {"beta": 5.0, **raw} if isinstance(raw, dict) and raw.get("method") == "norm" else raw


class Reject(Table):
    """Rejection sampling: `samples` answers to each of `prompts` problems of `puzzles` by the model of stage `start` (the one before, if
    it is not named); what the verifier calls right is kept, at most `keep` different answers a problem. It writes chats to learn from, and
    pairs of a right and a wrong answer, with a card (docs/post-training.md).

    reward: an earlier stage [prefer] whose method is "reward"; of a problem's right answers those with its highest scores are kept.
    checks: verifiers that must also call an answer right ("language", "format"). balance: no band of solve rates (quarters) gives more
    than an equal share of what was accepted."""

    start: str = ""
    puzzles: list[str] = ["countdown"]
    prompts: int = Field(256, ge=1)
    samples: int = Field(8, ge=1)
    keep: int = Field(2, ge=1)
    balance: bool = True
    reward: str = ""
    checks: list[str] = []
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(200, ge=1)


class Distil(Stage):
    """What a teacher knows, into the model of stage `start`. teacher: an earlier stage or a model folder with the same vocabulary. (Where
    the vocabularies differ, and for SFT on what a teacher wrote: `data` of sft.)

    method: "policy", `steps` times the student samples `samples` answers to each of `prompts` problems of `puzzles`, and the teacher's
    log-probability of each of its tokens teaches by reverse KL (on-policy distillation). "logits": the teacher's `top` most probable
    tokens at every answer token of the chats of `data`, files or earlier stages, or of the puzzles' own examples where it names none, are
    stored once, and the student learns from them by forward KL for `epochs`."""

    teacher: str
    method: Literal["policy", "logits"] = "policy"
    puzzles: list[str] = ["countdown"]
    steps: int = Field(60, ge=1)
    prompts: int = Field(32, ge=1)
    samples: int = Field(4, ge=1)
    max_tokens: int = Field(200, ge=1)
    data: list[str] = []
    top: int = Field(16, ge=1)
    tokens_per_step: int = Field(4096, ge=8)
    epochs: float = Field(1.0, gt=0)
    guard: Guard = Guard(sigma=0.0, patience=0)  # as in rl


GRADE = "grade:"  # begins the name of a puzzle whose problems are attempts to be graded (pascaline/data/puzzles/grade.py)


class Eval(Table):
    """Held-out problems of `puzzles` (the first is the headline). samples at each temperature; `votes` samples on `vote_problems`
    problems for the majority and best-of curves. grader: an earlier stage whose model grades those too, for the best of n by its grades
    (docs/post-training.md)."""

    puzzles: list[str] = ["countdown"]
    problems: int = Field(1000, ge=1)
    samples: int = Field(4, ge=1)
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    votes: int = Field(32, ge=1)
    vote_problems: int = Field(128, ge=1)
    grader: str = ""
    max_tokens: int = Field(256, ge=1)


class Ledger(Table):
    """What a run costs (docs/watching.md). watts: power of a device, for an estimate of energy; price: money an hour of a device costs, in
    `currency`. 0: not told."""

    watts: float = Field(0.0, ge=0)
    price: float = Field(0.0, ge=0)
    currency: str = ""


class Parallel(Table):
    """Several processes (docs/training.md). ranks: how many the recipe is for, 0 for any number; experts: how many of them share out the
    experts of a layer among them (expert parallelism), the rest of the model is cut over all; replicas: into so many groups the ranks are
    divided first, each with the whole model."""

    ranks: int = Field(0, ge=0)
    experts: int = Field(1, ge=1)
    replicas: int = Field(1, ge=1)


KINDS: dict[str, type[Table]] = {"pretrain": Pretrain, "extend": Extend, "sft": Sft, "prefer": Prefer, "rl": Rl, "reject": Reject,
                                 "distil": Distil}  # fmt: skip


def kind(stage: str) -> str:
    """What a stage does, which is what its name begins with: rl-all -> rl."""
    return stage.partition("-")[0]
