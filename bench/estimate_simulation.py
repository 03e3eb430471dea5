"""Does the estimate hold, and do its two picks pay? Synthetic competitions with a known truth.

    python bench/estimate_simulation.py --competitions 240 --first_seed 30000

Each competition has real (small) learners: logistic regressions on random features of noisy points, so that they are
wrong and over-confident of their own accord. A third is exchangeable, a third comes in groups (bursts of near-equal
points, folds by group), a third is shifted: test sub-clusters elsewhere, other class shares, half of them with random
folds over bursts. Settings of the estimate and of the picks were looked at on seeds below 20000 only.

Two finals against two finals, as Kaggle scores them: the better private score of each pair counts. "Public" takes the
two best public scores; "ours" is `finals.best_two`, from out-of-fold and public scores; "ideal" knows what nobody can
know, each candidate's accuracy on 5000 more images of the test's kind, and shows what can be reached at all.
"""

import argparse
import json
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from octofold.blend import blending, drawing, estimate, finals, rehearsal, shift, verdict
from octofold.infer.combining import Blend
from octofold.metrics import METRICS

KINDS = ("exchangeable", "groups", "shift")
OTHERS = ("macro_f1", "log_loss", "quadratic_kappa")
POPULATION = 5000
ACCURACY = METRICS["accuracy"]


@dataclass
class Competition:
    """One drawn competition: what a pipeline would hold, and the truth it would not."""

    kind: str
    oof: np.ndarray  # (M, N, K)
    target: np.ndarray
    fold: np.ndarray
    groups: np.ndarray
    test: np.ndarray  # (M, F, T, K)
    truth: np.ndarray
    train_features: np.ndarray
    test_features: np.ndarray
    population: np.ndarray  # (M, P, K), bagged: more images of the test's kind
    population_truth: np.ndarray


def points(rng: np.random.Generator, centres: np.ndarray, share: np.ndarray, rows: int, bursts: bool) -> Any:
    """Draw points: class, group and place."""
    classes, subs, width = centres.shape
    label, group, place, count = [], [], [], 0
    while len(label) < rows:
        size = 1 + rng.poisson(4) if bursts else 1
        own = rng.choice(classes, p=share)
        centre = centres[own, rng.integers(subs)] + rng.normal(size=width)
        label += [own] * size
        group += [count] * size
        place += list(centre + (0.25 if bursts else 0.0) * rng.normal(size=(size, width)))
        count += 1
    return np.array(label[:rows]), np.array(group[:rows]), np.array(place[:rows])


def draw(seed: int) -> Competition:
    """Make one competition and let its members learn it."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % 3]
    classes, width = int(rng.integers(3, 11)), 10
    rows, tests = int(rng.integers(500, 1500)), int(rng.integers(400, 1300))
    centres = rng.normal(size=(classes, int(rng.integers(1, 5)), width)) * rng.uniform(0.9, 1.8)
    share = rng.dirichlet(np.full(classes, 8.0))
    bursts = kind == "groups" or (kind == "shift" and rng.random() < 0.5)
    target, groups, train = points(rng, centres, share, rows, bursts)
    moved, test_share = centres, share
    if kind == "shift":
        moved = centres + rng.uniform(0.2, 0.8) * rng.normal(size=centres.shape)
        test_share = rng.dirichlet(share * 40)
    truth, _, test = points(rng, moved, test_share, tests, bursts)
    by = groups if kind == "groups" else np.arange(rows)
    fold = np.zeros(rows, int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class rarer than the folds
        for number, (_, held) in enumerate(
            StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(train, target, by)
        ):
            fold[held] = number
    aside = np.random.default_rng([seed, 1])  # leaves the competition itself as it is
    population_truth, _, population = points(aside, moved, test_share, POPULATION, False)
    oof, said, far, features = [], [], [], None
    for _ in range(int(rng.integers(2, 6))):
        noise, hidden = rng.uniform(0.1, 1.0), int(rng.integers(15, 80))
        weights, bias = rng.normal(size=(width, hidden)) / np.sqrt(width), rng.normal(size=hidden)
        own, new = (np.maximum((x + noise * rng.normal(size=x.shape)) @ weights + bias, 0) for x in (train, test))
        more = np.maximum((population + noise * aside.normal(size=population.shape)) @ weights + bias, 0)
        values, votes = np.zeros((rows, classes)), np.zeros((5, tests, classes))
        beyond = np.zeros((POPULATION, classes))
        strength = 10 ** rng.uniform(-2, 1)
        for held in range(5):
            inside = fold != held
            model = LogisticRegression(C=strength, max_iter=60, tol=1e-3).fit(own[inside], target[inside])
            values[np.ix_(~inside, model.classes_)] = model.predict_proba(own[~inside])
            votes[held][:, model.classes_] = model.predict_proba(new)
            beyond[:, model.classes_] += model.predict_proba(more) / 5
        oof.append(values)
        said.append(votes)
        far.append(beyond)
        features = (own, new) if features is None else features
    assert features is not None
    more_than_enough = np.stack(far), population_truth
    return Competition(kind, np.stack(oof), target, fold, by, np.stack(said), truth, *features, *more_than_enough)


def judge(game: Competition, seed: int) -> dict[str, Any]:
    """Run our estimate and our picks, then look at the truth."""
    names = [f"m{place}" for place in range(len(game.oof))]
    judged = verdict.judge("lr_mse", game.oof, names, game.target, game.fold, game.groups, ACCURACY, seed=seed)
    parts = [shift.measure(game.train_features, game.fold == held, game.test_features) for held in range(2)]
    folds = [game.test[:, held] for held in range(game.test.shape[1])]
    outlook = shift.foresee(
        judged.cross.values, game.target, [judged.blend.apply(part) for part in folds], judged.standard_error,
        shift.pooled(parts), (game.oof, folds), rehearsal.rehearse(game.train_features, game.target),
    )  # fmt: skip
    bagged = game.test.mean(axis=1)
    final = judged.blend.apply(bagged)
    right = ACCURACY.score(final, game.truth)
    others = {}
    for name in OTHERS:
        known = judged.cross.values, game.target, game.groups
        found = drawing.derived(final, outlook, METRICS[name], *known, seed=seed)
        others |= {f"{name}_truth": METRICS[name].score(final, game.truth)} | {
            f"{name}_{end}": value for end, value in found._asdict().items()
        }
    return {
        "kind": game.kind,
        "truth": right,
        "oof": outlook.oof,
        "estimate": outlook.accuracy.value,
        "low": outlook.accuracy.low,
        "high": outlook.accuracy.high,
        "auc": outlook.distance.auc if outlook.distance else 0.5,
        **others,
        **picks(game, bagged, seed),
    }


def picks(game: Competition, bagged: np.ndarray, seed: int, public_share: float = 0.3) -> dict[str, Any]:
    """Choose two finals by the public board, ours, and the ideal ones; score them on the private part.

    The candidates are what people submit: each member, five fitted blends, and a dozen variations tried by hand
    (weights drawn at random, classes pushed up or down a little).
    """
    fitted = {
        method: blending.fit(method, game.oof, game.target, game.fold)
        for method in ("equal", "lr_mse", "log_loss", "geometric", "hill_climb")
    }
    oof = [*game.oof]
    oof += [estimate.cross_fit(name, game.oof, game.target, game.fold, ACCURACY).values for name in fitted]
    test = [*bagged, *(blend.apply(bagged) for blend in fitted.values())]
    far = [*game.population, *(blend.apply(game.population) for blend in fitted.values())]
    rng = np.random.default_rng(seed)
    for _ in range(12):
        bias = rng.uniform(0, 0.6) * rng.normal(size=game.oof.shape[2])
        tried = Blend("tried", "biased", rng.dirichlet(np.ones(len(game.oof))), {"bias": bias.tolist()})
        oof.append(tried.apply(game.oof))
        test.append(tried.apply(bagged))
        far.append(tried.apply(game.population))
    is_public = rng.random(len(game.truth)) < public_share
    hits = np.stack([values.argmax(axis=1) == game.truth for values in test])
    public, private = hits[:, is_public].mean(axis=1), hits[:, ~is_public].mean(axis=1)
    theirs = np.argsort(-public, kind="stable")[:2]
    belief = finals.believe(
        oof, game.target, game.groups, ACCURACY, public, len(game.truth), public_share, seed=seed
    )  # fmt: skip
    assert belief is not None  # accuracy: every resample has a score
    ours = finals.best_two(belief)
    one = [int(belief.mean.argmax())]
    known = np.stack([values.argmax(axis=1) == game.population_truth for values in far]).astype(float)
    row = np.cov(known)
    ideal = finals.best_two(finals.Belief(known.mean(axis=1), row / (~is_public).sum(), 0.0))
    return {
        "private_ours": private[list(ours)].max(), "private_public": private[theirs].max(), "best": private.max(),
        "private_ideal": private[list(ideal)].max(), "one_ours": private[one].max(), "one_public": private[theirs[0]],
    }  # fmt: skip


def main() -> None:
    """Draw, judge, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--competitions", type=int, default=240, help="how many to draw")
    parser.add_argument("--first_seed", type=int, default=20_000, help="seed of the first")
    parser.add_argument("--out", default="", help="CSV of every competition")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")  # convergence of the toy learners
    rows = []
    for seed in range(flags.first_seed, flags.first_seed + flags.competitions):
        rows.append(judge(draw(seed), seed))
        print(f"\r{len(rows)} of {flags.competitions}", end="", file=sys.stderr, flush=True)
    if flags.out:
        import pandas as pd

        pd.DataFrame(rows).to_csv(flags.out, index=False)
    print(json.dumps(measured(rows), indent=2))


def measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Coverage and error by kind, and how often our picks won."""
    found: dict[str, Any] = {}
    for kind in ("all", *KINDS):
        some = [row for row in rows if kind in ("all", row["kind"])]
        if some:
            found[kind] = {
                "competitions": len(some),
                "coverage": round(float(np.mean([row["low"] <= row["truth"] <= row["high"] for row in some])), 4),
                "width": round(float(np.mean([row["high"] - row["low"] for row in some])), 4),
                "error": round(float(np.mean([abs(row["estimate"] - row["truth"]) for row in some])), 4),
                "bias": round(float(np.mean([row["estimate"] - row["truth"] for row in some])), 4),
                "error_of_folds": round(float(np.mean([abs(row["oof"] - row["truth"]) for row in some])), 4),
            }
            for name in OTHERS:
                held = [row[f"{name}_low"] <= row[f"{name}_truth"] <= row[f"{name}_high"] for row in some]
                error = [abs(row[f"{name}_value"] - row[f"{name}_truth"]) for row in some]
                found[kind] |= {f"{name}_coverage": round(float(np.mean(held)), 4)}
                found[kind] |= {f"{name}_error": round(float(np.mean(error)), 4)}
            found[kind]["two_finals"] = compared(some, "private_ours", "private_public")
            found[kind]["two_finals_ideal"] = compared(some, "private_ideal", "private_public")
            found[kind]["one_final"] = compared(some, "one_ours", "one_public")
    return found


def compared(rows: list[dict[str, Any]], mine: str, theirs: str) -> dict[str, Any]:
    """How often one choice ends better than another, of the times that they do not end alike."""
    gaps = np.array([row[mine] - row[theirs] for row in rows])
    differ = int((gaps != 0).sum())
    return {
        "differ": differ,
        "better": round(float((gaps > 0).sum() / differ), 4) if differ else None,
        "gain": round(float(gaps.mean()), 5),
        "regret": round(float(np.mean([row["best"] - row[mine] for row in rows])), 5),
        "regret_theirs": round(float(np.mean([row["best"] - row[theirs] for row in rows])), 5),
    }


if __name__ == "__main__":
    main()
