"""The flags of every entry point. Light to import: `--help` answers at once."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt

from octofold.config import Section
from octofold.recipe import Recipe

Stage = Literal["staging", "production"]
COMPETITION = r"^[A-Za-z0-9_\-]{1,60}$"
ANY = r"^[A-Za-z0-9_\-]{0,60}$"


class Prepare(Section):
    """Images and labels become a manifest."""

    competition: str = Field(
        pattern=COMPETITION, description="name of the problem; names the experiment and data/<competition>/"
    )
    images: Path | None = Field(None, description="folder the labels' image names are relative to, or class folders")
    source: str = Field(
        "",
        description="instead of --images: an archive (.zip, .tar, .tar.gz ...), a folder, hf:OWNER/NAME or hf:FOLDER,"
        " torchvision:NAME, kaggle:COMPETITION; unpacked into data/<competition>/raw/",
    )
    labels: Path | None = Field(None, description="CSV of images and labels; none = class folders under --images")
    image_column: str = Field("image", description="column of --labels holding the image name")
    label_column: str = Field("label", description="column of --labels holding the class (text or int)")
    classes: Path | None = Field(None, description="list (JSON, or a name a line) that fixes the class order")
    group: str = Field("auto", description="auto | none | a column: samples that must not be split across folds")
    twins: bool = Field(
        True, description="photos: look for near-duplicates by embedding too (one forward pass an image, kept)"
    )
    test_images: Path | None = Field(None, description="folder of test images")
    sample_submission: Path | None = Field(None, description="CSV whose order and columns the submission must have")
    folds: int = Field(5, ge=2, le=50, description="number of folds")
    holdout: float | None = Field(
        None, gt=0, lt=1, description="instead of --folds: hold this share out as fold 0; train it by --folds 0"
    )
    folds_file: Path | None = Field(None, description="CSV image,label,fold: use these folds, do not make any")
    seed: int = Field(0, ge=0, description="of the fold assignment")
    task: Literal["classify", "keypoints"] = Field("classify", description="classes, or points (x, y columns)")
    builtin: Literal["", "digits"] = Field(
        "", description="an embedded data set instead of files: digits (scikit-learn)"
    )
    swap: str = Field(
        "", description="keypoints: mirror twins, left_eye:right_eye,... or a JSON file; none = no point has one"
    )
    test_points: Path | None = Field(None, description="keypoints: table of the points each test image is asked for")
    conflicts: Literal["drop", "refuse"] = Field(
        "drop", description="one image under two labels: leave both out, or stop"
    )
    decisions: Path | None = Field(None, description="journal of review decisions to replay")
    previous: Path | None = Field(
        None, description="earlier manifest whose samples keep their folds; none = with --decisions, the one replaced"
    )
    out: Path | None = Field(None, description="folder to write; none = data/<competition>")


class Train(Recipe):
    """A recipe over folds and seeds becomes a member: registered fold models and OOF."""

    manifest: Path = Field(description="manifest.csv that prepare wrote")
    config: Path | None = Field(None, description="recipe (YAML); flags override it")
    stage: Literal["", "staging", "production"] = Field(
        "", description="promote the member when all its slots are trained"
    )
    restart: bool = Field(False, description="throw unfinished slots away and train all of them anew")
    executor: Literal["local", "ray"] = Field(
        "local", description="processes of this machine, or a Ray cluster (RAY_ADDRESS)"
    )
    parallel: int | None = Field(
        None, ge=1, description="slots trained at once; null = one a GPU, else one per 4 cores and 2 GB of free memory"
    )
    lease_min: float = Field(
        10.0,
        gt=0,
        description="silent for so long, this command loses its slots to others that train the member, minutes",
    )


class Infer(Section):
    """Models over images become Predictions."""

    model: str = Field(
        "", description="models:/NAME/VERSION, models:/NAME@alias, a checkpoint folder, or a folder of them"
    )
    competition: str = Field(
        "", pattern=ANY, description="with --member and --stage: the registered fold models, bagged"
    )
    member: str = Field("", description="recipe name; empty = the competition's registered blend")
    stage: Stage = Field("production", description="registry stage the member or blend is taken from")
    images: Path = Field(description="folder of images (searched recursively), one image, or a manifest CSV")
    tta: str = Field(
        "", description="views: none, flip, geo4, geo8, geo8_original; empty = the blend's own, or the recipe's"
    )
    out: Path | None = Field(
        None, description="where to write predictions.parquet and .csv; none = runs/infer/<run id>"
    )
    sort_into: Path | None = Field(None, description="also copy each image into DIR/<predicted class>/")
    batch_size: int = Field(8, ge=1, description="images per pass, each in all views")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to compute")
    shards: int = Field(0, ge=0, description="resumable parts the job is cut into; 0 = one per 2048 images")
    shard: int | None = Field(
        None, ge=0, description="make only this part (for several machines sharing mlruns/); null = all, then join"
    )
    executor: Literal["local", "ray"] = Field(
        "local", description="processes of this machine, or a Ray cluster (RAY_ADDRESS) that shares this folder"
    )
    parallel: int | None = Field(
        None, ge=1, description="shards predicted at once; null = one here (it takes every core), as many as fit on Ray"
    )
    engine: Literal["auto", "eager", "channels_last", "compile", "openvino"] = Field(
        "auto", description="how networks are run; auto = the fastest that gives eager's probabilities to 1e-5"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 = faster, labels only, agreement stated")
    early_exit: float = Field(
        0.0, ge=0, le=1,
        description="0 = off; 1 = leave an image once no view left can change its label; less = sooner. Labels only,"
        " and only of weighted means",
    )  # fmt: skip


class Evaluate(Section):
    """A member, a run or a Predictions file becomes scores and pictures."""

    manifest: Path = Field(description="manifest.csv holding the truth")
    predictions: Path | None = Field(None, description="Predictions file")
    run: str = Field("", description="MLflow run id whose OOF to score")
    competition: str = Field("", pattern=ANY, description="with --member and --stage: the registered fold models' OOF")
    member: str = Field("", description="recipe name")
    stage: Stage = Field("production", description="registry stage the member is taken from")
    tta: str = Field("", description="views the OOF was made with; empty = the most that are stored")
    metric: str = Field("", description="also score by this function of yours: path/to/file.py:function")
    out: Path | None = Field(None, description="folder for tables and pictures; none = runs/evaluate/<run id>")


class Promote(Section):
    """A member's slots move to a stage: alias first, MLflow's legacy stage as its mirror."""

    competition: str = Field(pattern=COMPETITION, description="name of the problem")
    member: str = Field("", description="recipe name; empty with --rollback = every member the last promotion moved")
    stage: Stage = Field("production", description="where to")
    folds: list[int] | None = Field(None, description="only these folds (needs --force); null = all")
    seeds: list[int] | None = Field(None, description="only these seeds; null = all")
    rollback: bool = Field(False, description="restore what the last promotion to this stage replaced")
    force: bool = Field(False, description="promote although folds are missing or the manifest hash differs")


class Blend(Section):
    """Every member in a stage becomes one submission, with an estimate and a ledger."""

    competition: str = Field(pattern=COMPETITION, description="name of the problem")
    manifest: Path | None = Field(None, description="manifest.csv; none = data/<competition>/manifest.csv")
    stage: Stage = Field("production", description="registry stage the fold models are taken from")
    members: list[str] = Field([], description="only these members; empty = every member in the stage")
    method: str = Field("lr_mse", description="row of blending.METHODS: equal, lr_mse, simplex, ...")
    weights: dict[str, float] = Field(
        {}, description='instead of --method, shares by hand: {"lite0": 0.6, "lite1": 0.4}; choosing them is not scored'
    )
    bag: Literal["equal", "oof_acc"] = Field(
        "equal", description="how a member's fold models are averaged on test images"
    )
    tta: str = Field("geo8", description="views: none, flip, geo4, geo8, geo8_original, or auto")
    metric: str = Field(
        "",
        description="row of metrics.METRICS the blend is judged by, or path/to/file.py:function (values, target) ->"
        " float; empty = accuracy, or mse",
    )
    mixed: bool = Field(
        False, description="let in members trained on other data versions; fit on rows each predicted without training"
    )
    shift: bool = Field(True, description="compare test with training images in a member's embedding")
    public_share: float = Field(0.3, gt=0, lt=1, description="share of the test set behind the public board")
    register_model: bool = Field(True, description="pack the blend as one MLflow model, <competition>.blend")
    force: bool = Field(
        False, description="replace the blend in production although the gain over it is not separable; recorded"
    )
    out: Path | None = Field(None, description="folder for submission.csv and ledger; none = runs/blend/<run id>")
    seed: int = Field(0, ge=0, description="of the bootstrap")


class Clean(Section):
    """OOF becomes a queue of suspicious labels, a review page, and a journal of decisions."""

    manifest: Path = Field(description="manifest.csv under review")
    competition: str = Field("", pattern=ANY, description="name of the problem; empty = the manifest's")
    oof: list[Path] = Field([], description="OOF Predictions files; empty = every member in --stage, else every one")
    stage: Stage = Field("production", description="registry stage whose OOF is used")
    embed: str = Field(
        "auto",
        description="auto = ImageNet features from the offline extra, else colours | plain | none | a checkpoint",
    )
    journal: Path | None = Field(None, description="append-only decisions (JSONL); none = beside the manifest")
    reviewer: str = Field("", description="name written with each decision; empty = the login name")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 = the whole network (phone), link only")
    port: int = Field(0, ge=0, le=65535, description="of the review page; 0 = any free one")
    serve: bool = Field(True, description="open the review page; false = only write the queue")
    limit: int = Field(0, ge=0, description="queue length; 0 = all")
    out: Path | None = Field(None, description="folder for queue.csv; none = runs/clean/<run id>")


class Tune(Section):
    """A search space over a recipe becomes an Optuna study and a better recipe."""

    manifest: Path = Field(description="manifest.csv that prepare wrote")
    config: Path = Field(description="YAML holding these fields; at least recipe and space")
    recipe: Path | dict[str, Any] = Field(description="the base recipe, first trial and yardstick: a YAML or a mapping")
    space: dict[str, Any] = Field(
        {}, description="ranges over recipe fields, `optim.lr: {low: 1e-5, high: 1e-2, log: true}`; docs/tuning.md"
    )
    warm_start: list[str | dict[str, Any]] = Field(
        [], description="tried first: recipe YAMLs, mappings of searched fields, or `study:NAME` to take over trials"
    )
    trials: int | None = Field(20, ge=1, description="trials to reach in this study; null = no limit")
    hours: float | None = Field(None, gt=0, description="of trial time; null = no limit")
    slots: int | None = Field(None, ge=1, description="slots (fold, seed) to train in all trials; null = no limit")
    folds: list[int] | None = Field(None, description="folds each trial is scored on; null = all of the manifest's")
    seeds: list[NonNegativeInt] = Field([0], min_length=1, description="seeds each trial trains each fold with")
    views: str = Field("none", description="views a slot is scored with; none = the score of the last validation")
    objectives: list[Literal["score", "inference_ms"]] = Field(
        ["score"], min_length=1, description="score, or score,inference_ms (one image, one view) for a Pareto set"
    )
    sampler: Literal["gp", "tpe", "nsga2", "random"] = Field("gp", description="who proposes the next trial")
    pruner: Literal["wilcoxon", "median", "none"] = Field("wilcoxon", description="who stops a trial between slots")
    prune_p: float = Field(
        0.13, gt=0, lt=1, description="wilcoxon: one-sided p to stop at; n slots cannot go below 2^-n"
    )
    confirm_seeds: int = Field(
        2, ge=0, description="fresh seeds on which winner and base recipe are compared; 0 = none"
    )
    seed: int = Field(0, ge=0, description="of the sampler")
    study: str = Field("", description="study name; the same name resumes. Empty = <competition>.<config name>")
    executor: Literal["local", "ray"] = Field(
        "local", description="trials on this machine, or on RAY_ADDRESS's cluster"
    )
    parallel: int | None = Field(None, ge=1, description="trials at once; null = as many as the machine bears")
    storage: str = Field(
        "", description="Optuna storage URL; empty = OCTOFOLD_STORAGE (.env), else sqlite in mlruns/optuna.db"
    )
    out: Path | None = Field(None, description="folder for the recipes found; none = runs/tune/<study>")


class Relocate(Section):
    """`mlruns/` was moved or copied to another folder or machine: make its store point at where it is now."""

    old: str = Field("", description="folder mlruns stood in before; empty = found out from the store")
    dry: bool = Field(False, description="only say what would change")


class Gc(Section):
    """List what nothing refers to in `mlruns/`, and remove it if you say so."""

    yes: bool = Field(False, description="remove without asking; without it and without a terminal, only list")
    work_days: float = Field(7.0, ge=0, description="unfinished trainings untouched for so many days count, days")


class Worth(Recipe):
    """Was the cleaning worth it? One recipe on two manifests, scored on the same trusted rows."""

    manifest: Path = Field(description="the new manifest.csv")
    old: Path | None = Field(None, description="the manifest before; none = the version that --manifest replaced")
    config: Path | None = Field(None, description="recipe (YAML); flags override it")
    journal: Path | None = Field(None, description="decisions (JSONL); none = decisions.jsonl beside the manifest")
    worth_seed: int = Field(0, ge=0, description="of the resampling")


class Export(Section):
    """A member's fold models and OOF become one bundle that another machine imports."""

    competition: str = Field(pattern=COMPETITION, description="name of the problem")
    member: str = Field(description="recipe name")
    stage: Literal["", "staging", "production"] = Field(
        "", description="which versions; empty = the newest of each slot, on the manifest at hand if there is one"
    )
    out: Path | None = Field(None, description="bundle to write (.zip); none = runs/export/<competition>.<member>.zip")


class Import(Section):
    """Fold models and OOF made elsewhere become registered slots, once every check has passed."""

    bundle: Path = Field(description="a bundle (.zip), its folder, or a files.csv of id,name,bytes,sha256")
    manifest: Path = Field(description="manifest.csv the models were trained on")
    facts: Path | None = Field(
        None,
        description="weights and OOF not made here: YAML that says which network, classes, folds (docs/cleaning.md)",
    )


class Probe(Recipe):
    """One idea against another, on the same folds and seeds: paired difference, interval, verdict."""

    manifest: Path = Field(description="manifest.csv that prepare wrote")
    config: Path | None = Field(None, description="recipe (YAML) that is varied, or the reference; flags override it")
    field: str = Field("", description="recipe field to vary: augment.preset, model.name, phases.0.lr, ...")
    values: list[str] = Field([], description="its values; the first is the reference")
    others: list[Path] = Field([], description="instead of --field: recipes (YAML) to set beside --config")
    probe_seed: int = Field(0, ge=0, description="of the resampling")


class Report(Section):
    """A competition's history becomes one page: where it stands, how sure that is, what to do next."""

    competition: str = Field(pattern=COMPETITION, description="name of the problem")
    manifest: Path | None = Field(None, description="manifest.csv; none = data/<competition>/manifest.csv")
    metric: str = Field(
        "",
        description="row of metrics.METRICS, or path/to/file.py:function; empty = the newest blend's, or the task's",
    )
    seed: int = Field(0, ge=0, description="of the bootstrap")
    out: Path | None = Field(None, description="folder for report.html; none = runs/report/<competition>")


class Score(Section):
    """What the boards said of a submission."""

    competition: str = Field("", pattern=ANY, description="name of the problem; empty = the submission's")
    submission: Path | None = Field(None, description="submission.csv where blend wrote it")
    public: float | None = Field(None, description="public score that came back")
    private: float | None = Field(None, description="private score that came back")
    notes: str = Field("", description="anything worth remembering")
    metric: str = Field(
        "",
        description="of the boards, row of metrics.METRICS or path/to/file.py:function; empty = the newest blend's",
    )
    history: Path | None = Field(
        None, description="CSV of past submissions: date,submission_file,public_score,private_score,category,notes"
    )


class Compare(Section):
    """Rows on which two submissions differ, and who changed them."""

    submission: Path = Field(description="submission.csv where blend wrote it (the new one)")
    other: Path = Field(description="the one it is compared with (the old one)")
    show: int = Field(20, ge=0, description="rows to print")
    out: Path | None = Field(None, description="CSV of the differences; none = runs/compare/<run id>.csv")


class Explain(Section):
    """One row of a submission, led back to whatever made it."""

    submission: Path = Field(description="submission.csv where blend wrote it")
    image: str = Field(description="file name as in the submission, or sample id")
    views: bool = Field(True, description="ask the fold models view by view (needs the registry)")
    out: Path | None = Field(None, description="picture to write; none = runs/explain/<run id>.png")


class Demo(Section):
    """The whole job on scikit-learn's digits."""

    folds: int = Field(4, ge=2, le=10, description="folds of each member")
    configs: list[Path] = Field(
        [Path("configs/digits/cnn.yaml"), Path("configs/digits/wide.yaml")], description="recipes of the members"
    )
    stage: Stage = Field("production", description="registry stage to promote to")
