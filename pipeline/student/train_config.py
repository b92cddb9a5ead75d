"""Options of stage two: `distill train-student` and `distill.train_student`.

Every default, range and help text of a training run is here. What becomes of them in transformers' TrainingArguments
is in `training.training_arguments`. Standard library only (see `pipeline.options`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError
from pipeline.models.loading_options import COMPILE, PADDING_FREE, REVISION, TRUST_REMOTE_CODE
from pipeline.options import check_ranges, option, options_of
from pipeline.student.cache_paths import CACHE_DIR, CACHE_DIR_GB

if TYPE_CHECKING:
    from pipeline.models.adapters import Lora
    from pipeline.student.model.pruning import Sizes

IO, STUDENT, LORA, LOSS = "Input and output", "Student", "Adapters (LoRA, DoRA)", "Loss"
HIDDEN, OPTIMIZATION, STOPPING = "Hidden-state distillation", "Optimization", "Early stopping"
LOGGING, HARDWARE = "Logging and checkpoints", "Hardware"
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "none")


@dataclass(frozen=True, kw_only=True)
class TrainStudentConfig:
    """One run of stage two."""

    cache: str | tuple[str, ...] = option(
        help="Cache directory or URL; may be given several times. Caches are mixed by their weights, such as a:0.7 and "
        "b:0.3, or, without weights, in proportion to their loss tokens.",
        group=IO,
        common=True,
        metavar="PATH[:WEIGHT]",
    )
    # A directory, hub name or .gguf file; or (Python only) a loaded model, which is trained in place.
    student: Any = option(None, help="Student: transformers directory, hub name, or .gguf file.", group=IO, common=True)
    output: str = option(help="Directory for checkpoints and the trained student.", group=IO, common=True)
    eval_cache: str | None = option(
        None,
        help="Held-out cache. It is evaluated during training, and the best checkpoint is kept.",
        group=IO,
        common=True,
    )
    # Python only: a tokenizer object, for a student that is one too.
    tokenizer: Any = option(None, help="Tokenizer of a student that is given as an object.", group=IO, python_only=True)
    resume: bool = option(
        False, help="Continue from the last checkpoint in the output directory.", group=IO, common=True
    )
    overwrite: bool = option(False, help="Delete the student in the output directory first.", group=IO, common=True)
    cache_dir: str | None = CACHE_DIR(group=IO)
    cache_dir_gb: float = CACHE_DIR_GB(group=IO)

    student_layers: int | None = option(
        None, help="Number of layers to keep, evenly spaced.", group=STUDENT, minimum=1, common=True
    )
    student_width: int | None = option(None, help="Hidden size to keep.", group=STUDENT, minimum=1)
    student_intermediate: int | None = option(None, help="Neurons to keep in each MLP.", group=STUDENT, minimum=1)
    student_heads: int | None = option(None, help="Attention heads to keep in each layer.", group=STUDENT, minimum=1)
    student_random: bool = option(
        False, help="Use only the architecture of the student, with random weights.", group=STUDENT
    )
    student_config: str | None = option(
        None,
        help="config.json of a student with random weights, instead of a checkpoint.",
        group=STUDENT,
        metavar="FILE",
    )
    freeze_embeddings: bool = option(
        False, help="Do not train token embeddings, nor a head tied to them.", group=STUDENT
    )
    cross_tokenizer: Literal["project", "uld"] | None = option(
        None,
        help="For a student whose tokenizer differs. project: learn the targets of shared tokens. uld: compare sorted "
        "probabilities.",
        group=STUDENT,
    )
    revision: str | None = REVISION(group=STUDENT)
    trust_remote_code: bool = TRUST_REMOTE_CODE(group=STUDENT)

    lora_rank: int | None = option(
        None, help="Train adapters of this rank (needs distill[peft]).", group=LORA, minimum=1
    )
    lora_alpha: float | None = option(
        None,
        help="Scale of the adapters, which are multiplied by alpha/rank.",
        group=LORA,
        above=0,
        below=math.inf,
        default_text="2 × rank",
    )
    lora_dropout: float | None = option(
        None, help="Dropout on the input of an adapter.", group=LORA, minimum=0, below=1, default_text="0"
    )
    lora_targets: str = option(
        "auto", help="Modules to adapt, such as q_proj,v_proj. auto: all linear layers except the head.", group=LORA
    )
    dora: bool = option(False, help="Adapt direction and length of weights separately (DoRA).", group=LORA)
    lora_head: bool = option(False, help="Adapt the vocabulary head too.", group=LORA)
    merge_adapter: bool = option(False, help="Save a plain model instead of an adapter.", group=LORA)

    kd_weight: float = option(
        0.9, help="α, weight of the soft loss. 0: hard labels only. 1: teacher only.", group=LOSS, common=True
    )
    temperature: float | None = option(
        None,
        help="Temperature of the soft loss, which is scaled by T².",
        group=LOSS,
        default_text="the temperature of the cache",
        common=True,
    )
    tail: Literal["sampled", "realized", "bucket", "renormalise", "label"] | None = option(
        None,
        help="Treatment of the tail mass. sampled: by its sample. realized: by the teacher's own text. bucket: as one "
        "class. renormalise: ignored. label: given to the label.",
        group=LOSS,
        default_text="sampled if cache and divergence allow it, else bucket",
    )
    divergence: str = option(
        "forward-kl",
        help="Divergence of the soft loss: forward-kl, reverse-kl, js(0.5), skew-forward-kl(0.1), "
        "skew-reverse-kl(0.1), tvd, alpha-beta(0.5,0.5), logit-mse, pairwise, my_module.my_function, or a sum such as "
        "forward-kl:0.7,reverse-kl:0.3.",
        group=LOSS,
    )
    kd_schedule: str | None = option(
        None,
        help="Schedule of α: linear:FROM:TO, wsd:FROM:PEAK:TO[:WARMUP:DECAY] or constant:V. Replaces `kd_weight`.",
        group=LOSS,
    )
    temperature_schedule: str | None = option(
        None, help="Schedule of the temperature, in the same form. Replaces `temperature`.", group=LOSS
    )
    position_weighting: Literal["uniform", "teacher-entropy", "student-entropy"] = option(
        "uniform", help="Weight of a position: 1, or entropy / log V.", group=LOSS
    )
    resample: bool = option(False, help="Use a different stored tail sample in each epoch.", group=LOSS)

    hidden_loss: Literal["cosine", "mse", "normalized-mse"] | None = option(
        None, help="Match the hidden states stored in the cache with this loss.", group=HIDDEN
    )
    hidden_weight: float | None = option(
        None, help="γ, weight of the hidden-state loss.", group=HIDDEN, default_text="1"
    )
    layer_map: str | None = option(
        None,
        help="Pairs of layers: uniform, last, or STUDENT:TEACHER such as 3:6,6:12.",
        group=HIDDEN,
        default_text="uniform",
    )

    batch_size: int = option(8, help="Rows per device and forward pass.", group=OPTIMIZATION, minimum=1, common=True)
    gradient_accumulation_steps: int = option(
        1, help="Forward passes per optimizer step.", group=OPTIMIZATION, minimum=1
    )
    learning_rate: float = option(
        3e-4, help="Peak learning rate.", group=OPTIMIZATION, minimum=0, below=math.inf, common=True
    )
    lr_scheduler: str = option(
        "cosine", help="Learning-rate schedule, by its name in transformers.", group=OPTIMIZATION
    )
    warmup: float = option(
        0.05,
        help="Warmup steps, or a fraction of all steps if below 1.",
        group=OPTIMIZATION,
        minimum=0,
        below=math.inf,
    )
    weight_decay: float = option(0.0, help="Weight decay.", group=OPTIMIZATION, minimum=0, below=math.inf)
    epochs: float = option(1.0, help="Passes over the cache.", group=OPTIMIZATION, above=0, below=math.inf, common=True)
    max_steps: int | None = option(None, help="Optimizer steps, instead of epochs.", group=OPTIMIZATION, minimum=1)
    max_tokens: int | None = option(
        None, help="Input tokens to train on, instead of epochs or steps.", group=OPTIMIZATION, minimum=1
    )
    seed: int = option(0, help="Seed for the order of rows, random weights and dropout.", group=OPTIMIZATION)

    logging_steps: int = option(10, help="Steps between logs.", group=LOGGING, minimum=1)
    eval_steps: int = option(100, help="Steps between evaluations on the held-out cache.", group=LOGGING, minimum=1)
    save_steps: int | None = option(
        None,
        help="Steps between checkpoints.",
        group=LOGGING,
        minimum=1,
        default_text="`eval_steps`, or 500 without a held-out cache",
    )
    report_to: tuple[str, ...] = option(
        (),
        help="Tracker for the metrics: tensorboard (in OUTPUT/runs), trackio, wandb, mlflow or none; may be given "
        "several times.",
        group=LOGGING,
        metavar="TRACKER",
        default_text="none",
    )
    run_name: str | None = option(
        None, help="Name of the run in the trackers.", group=LOGGING, default_text="chosen by the tracker"
    )
    early_stopping: tuple[str, ...] = option(
        (),
        help="Stop when a held-out metric has not improved by MIN_DELTA (0.01, 0.5% or noise) in PATIENCE evaluations; "
        "may be given several times. The word default stands for kl:0.5%:3 and ce:noise:3.",
        group=STOPPING,
        metavar="METRIC:MIN_DELTA:PATIENCE",
    )
    early_stopping_mode: Literal["all", "any"] = option(
        "all", help="Whether all of several conditions must hold, or any one.", group=STOPPING
    )

    device: str = option("auto", help="auto or cpu. Choose GPUs with CUDA_VISIBLE_DEVICES.", group=HARDWARE)
    bf16: bool | None = option(
        None,
        help="bfloat16 autocast; weights stay float32.",
        group=HARDWARE,
        default_text="on for GPUs that support it, else off",
        common=True,
    )
    padding_free: bool | None = PADDING_FREE(group=HARDWARE)
    compile: bool = COMPILE(group=HARDWARE)
    gradient_checkpointing: bool | None = option(
        None, help="Trade time for memory by recomputing activations.", group=HARDWARE, default_text="off"
    )
    dataloader_num_workers: int | None = option(
        None,
        help="Number of processes that read the cache; with 0, threads of the training process read ahead.",
        group=HARDWARE,
        minimum=0,
        default_text="0; 1 for a URL, or on a GPU with another tokenizer",
    )
    # A JSON file, or (in Python and in a config file) its contents.
    training_args: Any = option(
        None,
        help="JSON file with any transformers.TrainingArguments. Options given here override it.",
        group=HARDWARE,
        metavar="FILE",
        table=True,
    )
    # Names of the options that were given, even if at their default; see `given`.
    explicit: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.kd_weight != 0.9:
            self.check_explicit("kd_weight")
        if self.device not in ("auto", "cpu"):
            raise ConfigError(f"`device` {self.device}: expected auto or cpu. Choose GPUs with CUDA_VISIBLE_DEVICES.")
        unknown = [name for name in self.report_to if name not in TRACKERS]
        if unknown:
            raise ConfigError(f"`report_to` {unknown[0]}: expected {', '.join(TRACKERS)}. Correct the name.")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ConfigError("`report_to` none: found other trackers as well. Leave none out.")
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets", "dora", "lora_head", "merge_adapter"):
                if getattr(self, name) not in (None, False, "auto"):
                    raise ConfigError(f"`{name}`: there is no adapter without `lora_rank`. Give a rank, such as 16.")

    def check_explicit(self, *names: str) -> None:
        """Raises: ConfigError for a weight of the soft loss next to its schedule."""
        if self.kd_schedule is not None and "kd_weight" in (*self.explicit, *names):
            raise ConfigError("`kd_schedule`: replaces `kd_weight`. Give one of them.")

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that were given, which win over `training_args`."""
        declared = options_of(TrainStudentConfig)
        return self.explicit.union(name for name in declared if getattr(self, name) != declared[name].default)

    @property
    def sizes(self) -> Sizes:
        """What a narrower student keeps."""
        from pipeline.student.model.pruning import Sizes

        return Sizes(width=self.student_width, intermediate=self.student_intermediate, heads=self.student_heads)

    @property
    def creates_student(self) -> bool:
        """Whether the student's initial weights are made by the run instead of loaded as they are."""
        return bool(self.student_config or self.student_layers or self.student_random or self.sizes)

    @property
    def lora(self) -> Lora | None:
        """The adapter to train; None for a student that is trained as a whole."""
        from pipeline.models.adapters import Lora

        if self.lora_rank is None:
            return None
        return Lora(
            rank=self.lora_rank,
            alpha=2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,
            dropout=self.lora_dropout or 0.0,
            targets=() if self.lora_targets == "auto" else tuple(t.strip() for t in self.lora_targets.split(",")),
            dora=self.dora,
            head=self.lora_head,
            merged=self.merge_adapter,
        )
