"""Flip some labels on purpose, rank all samples by suspicion, count how many of the flipped come first.

    python bench/label_noise.py --data ../shared/data/grocery15 [--cache features.npz] [--seeds 3]

The data set: `<data>/train.csv` (image,label,product) and `<data>/train/`. Members: logistic regression on features
of EfficientNet-Lite0 (ImageNet weights from a pip package), 5 folds that no cluster of near-duplicates crosses, two
fold seeds. Corruptions: `random` (any other class), `alike` (one of the two classes whose mean feature is nearest),
`product` (a third of a product's photos at once, to one look-alike class: a box of pears sorted into the apples).

Prints, as Markdown, the mean over seeds of precision among the first F (F = number of flips) and recall within the
first tenth of the queue.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from octofold.clean import suspicion

KINDS = (("random", 0.05), ("random", 0.10), ("alike", 0.05), ("alike", 0.10), ("product", 0.05))


def features_of(data: Path, cache: Path | None) -> tuple[np.ndarray, pd.DataFrame]:
    """``(N, 1280)`` float32 and the table they belong to, row for row."""
    table = pd.read_csv(data / "train.csv", dtype=str)
    if cache and cache.exists():
        kept = np.load(cache)
        if kept["image"].tolist() == table["image"].tolist():
            return kept["x"], table
    import torch

    from octofold import recipe
    from octofold.data import images
    from octofold.nets import models

    net = models.build(recipe.Model(name="tf_efficientnet_lite0", weights="package"), 2).eval()
    spec = images.PixelSpec(224)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(table), 32):
            names = table["image"][start : start + 32]
            pixels = np.stack([images.square(images.load(data / "train" / name, spec)[0], 224) for name in names])
            parts.append(net.features(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy())
    found = np.concatenate(parts)
    if cache:
        np.savez(cache, x=found, image=table["image"].to_numpy(str))
    return found, table


def clusters_of(unit: np.ndarray, cut: float = 0.4) -> np.ndarray:
    """``(N,)`` average-linkage clusters at this cosine distance: what must not be split across folds."""
    from sklearn.cluster import AgglomerativeClustering

    return AgglomerativeClustering(
        n_clusters=None, distance_threshold=cut, metric="precomputed", linkage="average"
    ).fit_predict(np.clip(1 - unit @ unit.T, 0, None))


def out_of_fold(features: np.ndarray, label: np.ndarray, groups: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """``(N, K)`` probabilities of samples that the model did not train on."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    probs = np.zeros((len(label), classes))
    for train, held in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(features, label, groups):
        model = LogisticRegression(C=0.01, max_iter=200).fit(features[train], label[train])
        probs[np.ix_(held, model.classes_)] = model.predict_proba(features[held])
    return probs


def corrupt(
    kind: str, rate: float, truth: np.ndarray, product: np.ndarray, alike: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The labels with some wrong, and the rows that are."""
    rng = np.random.default_rng(seed)
    label, classes, count = truth.copy(), int(truth.max()) + 1, round(rate * len(truth))
    if kind == "product":
        rows: list[int] = []
        for name in rng.permutation(np.unique(product)):
            mine = np.flatnonzero(product == name)
            mine = mine[rng.permutation(len(mine))[: max(4, len(mine) // 3)]]
            label[mine] = alike[truth[mine[0]], rng.integers(2)]
            rows += mine.tolist()
            if len(rows) >= count:
                break
        return label, np.array(rows)
    chosen = rng.choice(len(truth), count, replace=False)
    for row in chosen:
        others = alike[truth[row]] if kind == "alike" else np.delete(np.arange(classes), truth[row])
        label[row] = rng.choice(others)
    return label, chosen


def rankings(unit: np.ndarray, members: np.ndarray, label: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """``{name: (N,) suspicion}``, higher first."""
    probs, rows = members.mean(axis=0), np.arange(len(label))
    near, similarity = suspicion.nearest(unit)
    shares = suspicion.votes(near, similarity, label, probs.shape[1])
    narrow = suspicion.normalise(unit, 32)
    odd, stray = suspicion.isolated(narrow, label), suspicion.stray(narrow, label)
    _, confident = suspicion.confident_joint(probs, label)
    margin = suspicion.margin(probs, label)
    shuffled = np.random.default_rng(seed).permutation(len(label))
    found = {
        "**ours: models + neighbours**": suspicion.combine(probs, shares, label)[1],
        "ours, no OOF (neighbours only)": suspicion.combine(None, shares, label)[1],
        "ours, no embedding (models only)": suspicion.combine(probs, None, label)[1],
        "self-confidence": -probs[rows, label],
        "confident learning, by margin": ((confident >= 0) & (confident != label)) * 10.0 - margin,
        "isolation forest per class": odd,
        "isolation forest, features on shuffled ids (original 002's slip)": suspicion.isolated(narrow[shuffled], label),
        "DBSCAN per class": stray + 1e-3 * odd,
        "random": np.random.default_rng(seed).random(len(label)),
    }
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_ensemble_scores, get_label_quality_scores
    except ImportError:
        return found
    quality = get_label_quality_scores(label, probs, method="self_confidence")
    flagged = find_label_issues(label, probs, n_jobs=1)
    found["cleanlab: issues first, by self_confidence (its default)"] = flagged * 10.0 - quality
    found["cleanlab: self_confidence"] = -quality
    found["cleanlab: normalized_margin"] = -get_label_quality_scores(label, probs, method="normalized_margin")
    entropy = get_label_quality_scores(label, probs, method="confidence_weighted_entropy", adjust_pred_probs=False)
    found["cleanlab: confidence_weighted_entropy"] = -entropy
    found["cleanlab: ensemble of the members"] = -get_label_quality_ensemble_scores(label, list(members), verbose=False)
    return found


def main() -> None:
    """Run every corruption and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    features, table = features_of(options.data, options.cache)
    names, truth = np.unique(table["label"].to_numpy(str), return_inverse=True)
    unit = suspicion.normalise(features)
    centred = features - features.mean(axis=0)
    groups = clusters_of(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    scaled = suspicion.normalise(features / features.std(axis=0)) * 30
    centre = np.stack([unit[truth == one].mean(axis=0) for one in range(len(names))])
    closeness = centre @ centre.T - 9 * np.eye(len(names))
    alike = np.argsort(-closeness, axis=1)[:, :2]
    scores: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for kind, rate in KINDS:
        for seed in range(options.seeds):
            label, flipped = corrupt(kind, rate, truth, table["product"].to_numpy(str), alike, seed)
            members = np.stack([out_of_fold(scaled, label, groups, len(names), fold_seed) for fold_seed in range(2)])
            bad = np.zeros(len(label), bool)
            bad[flipped] = True
            for name, ranked in rankings(unit, members, label, seed).items():
                order = np.argsort(-ranked, kind="stable")
                found = (bad[order[: len(flipped)]].mean(), bad[order[: len(label) // 10]].sum() / len(flipped))
                scores.setdefault((name, f"{kind} {rate:.0%}"), []).append(found)
    columns = [f"{kind} {rate:.0%}" for kind, rate in KINDS]
    print("| ranking | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in dict.fromkeys(name for name, _ in scores):
        cells = ["{:.3f} / {:.3f}".format(*np.mean(scores[name, column], axis=0)) for column in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
