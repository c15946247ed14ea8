"""Pictures of what steppe curvature measured: spectra, slices, and what becomes of them over training."""

import contextlib
import math
from pathlib import Path

from steppe.lm import plot
from steppe.lm.track import lines
from steppe.scripts.results import Measurement, ResultsError, measured, read_json

_COLOURS = {"hessian": plot.BLUE, "ggn": plot.VERMILION, "nme": plot.GREEN}
_NAMES = {"hessian": "H", "ggn": "GGN", "nme": "NME"}


def of_checkpoint(path: Path) -> list[Path]:
    """Draws spectra-STEP.png and, where there are slices, slices-STEP.png beside STEP.json; returns their paths."""
    found = read_json(path, Measurement)
    title = f"{path.parents[1].resolve().name}, step {found['step']}"
    with _styled():
        drawn = [_spectra(found, title, path.with_name(f"spectra-{found['step']}.png"))]
        if "slices" in found:
            drawn.append(_slices(found, title, path.with_name(f"slices-{found['step']}.png")))
    return drawn


def over_training(workdir: str | Path) -> Path | None:
    """Draws curvature/training.png from every STEP.json and the run's curvature records; None where there are none."""
    found = []
    for path in measured(Path(workdir)):
        with contextlib.suppress(ResultsError):  # of another version, or damaged
            found.append(read_json(path, Measurement))
    recorded = lines.read(workdir).of("curvature")
    if not found and not recorded:
        return None
    path = Path(workdir) / "curvature" / "training.png"
    path.parent.mkdir(exist_ok=True)
    with _styled():
        return _training(found, recorded, Path(workdir).resolve().name, path)


def _styled():
    return plot.styled(font_size=9, lines_linewidth=1.5)


def _training(found: list[dict], recorded: list[dict], title: str, path: Path) -> Path:
    figure, (shares, norms, eigenvalues, sharpness) = _panels(7.5, 5.2, 2, 2, sharex=True)

    # two batches, so two lines: what the run recorded, and what was measured of its checkpoints
    series = {
        ("-", "while training"): [
            (r["step"], *(number(r.get("all", {}), key) for key in ("logit_norm", "functional_norm"))) for r in recorded
        ],
        ("--", "checkpoints"): [
            (f["step"], *(number(f["summary"], key) for key in ("delta_logit_norm", "delta_func_norm"))) for f in found
        ],
    }
    for (dash, label), rows in series.items():
        if rows:
            at, logit, functional = zip(*rows, strict=True)
            share = [b**2 / max(a**2 + b**2, 1e-300) for _, a, b in rows]
            shares.semilogy(at, share, dash, color=plot.GREEN, marker=".", label=label)
            norms.semilogy(at, logit, dash, color=plot.VERMILION, marker=".", label=f"δ_logit = GGN ε̂, {label}")
            norms.semilogy(at, functional, dash, color=plot.GREEN, marker=".", label=f"δ_func = NME ε̂, {label}")
    shares.set_title("share of δ_func in ‖δ_logit‖² + ‖δ_func‖²", loc="left", fontsize=9)
    norms.set_title("norms", loc="left", fontsize=9)
    for axes in (shares, norms):
        axes.legend(fontsize=7)

    steps = [f["step"] for f in found]
    for matrix, label in _NAMES.items():
        largest = [number(f["summary"], f"{matrix}_lambda_max".removeprefix("hessian_")) for f in found]
        eigenvalues.plot(steps, largest, color=_COLOURS[matrix], marker=".", label=label)
    eigenvalues.set_title("largest eigenvalue", loc="left", fontsize=9)
    for key, label, colour in (
        ("sam_sharpness", "worst case", plot.BLUE),
        ("logit_sharpness", "its logit part", plot.VERMILION),
        ("functional_sharpness", "its functional part", plot.GREEN),
        ("average_sharpness", "average case", plot.GREY),
    ):
        sharpness.plot(steps, [number(f["summary"], key) for f in found], color=colour, marker=".", label=label)
    sharpness.set_title("rise of the loss, nats per token", loc="left", fontsize=9)
    for axes in (eigenvalues, sharpness):
        axes.set_xlabel("step")
        if found:
            axes.legend(fontsize=8)
    return _save(figure, title, path)


def _panels(width: float, height: float, rows: int, columns: int, **shared):
    """(figure, its axes, row by row)."""
    figure = plot.figure(width, height)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).ravel()


def _save(figure, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    plot.save(figure, path, dpi=150)
    return path


def _spectra(found: dict, title: str, path: Path) -> Path:
    figure, panels = _panels(9, 2.9, 1, 3, sharey=True)
    for axes, (key, name) in zip(panels, _NAMES.items(), strict=True):
        spectrum, colour = found["spectra"][key], _COLOURS[key]
        axes.semilogy(spectrum["grid"], spectrum["density"], color=colour)
        axes.fill_between(spectrum["grid"], 1e-30, spectrum["density"], color=colour, alpha=0.2)
        axes.set_title(
            f"{name}: λ {spectrum['lambda_min']:.3g} to {spectrum['lambda_max']:.4g}, "
            f"trace {spectrum['trace']:.4g}", loc="left", fontsize=9,
        )  # fmt: skip
        axes.set_xlabel("eigenvalue")
    tallest = max(max(found["spectra"][key]["density"]) for key in _NAMES)
    # one eigenvalue alone stands about so high
    alone = min(1 / found["spectra"]["hessian"]["dimension"], 1e-3) * 0.01 * tallest
    panels[0].set_ylim(alone, 3 * tallest)
    panels[0].set_ylabel("density")
    return _save(figure, title, path)


def _slices(found: dict, title: str, path: Path) -> Path:
    import numpy as np

    slices = found["slices"]
    figure, (lines, noise, plane) = _panels(9, 3, 1, 3)
    for axes, names in ((lines, {"gradient": plot.BLUE, "nme": plot.GREEN}), (noise, {"random": plot.GREY})):
        for name, colour in names.items():
            label = {"gradient": "along ε̂", "nme": "NME's top eigenvector", "random": "a random direction"}[name]
            axes.plot(slices[name]["at"], _numbers(slices[name]["loss"]), color=colour, marker=".", label=label)
        axes.set_xlabel("distance from θ")
        axes.legend(fontsize=8)
    lines.set_ylabel("loss, nats per token")
    losses = np.array([_numbers(row) for row in slices["plane"]["loss"]])
    if np.isfinite(losses).all() and np.ptp(losses) > 0:
        drawn = plane.contourf(slices["plane"]["gradient"], slices["plane"]["nme"], losses, levels=12, cmap="viridis")
        figure.colorbar(drawn, ax=plane)
    plane.grid(False)
    plane.plot(0, 0, marker="+", color="white")
    plane.set_xlabel("along ε̂")
    plane.set_ylabel("along NME's top eigenvector", fontsize=8)
    return _save(figure, title, path)


def number(values: dict, key: str) -> float:
    """A number of a stored measurement, NaN where it has none."""
    found = values.get(key)
    return math.nan if found is None else found


def _numbers(values: list) -> list[float]:
    return [float("nan") if value is None else value for value in values]
