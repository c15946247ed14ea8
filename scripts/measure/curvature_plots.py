"""Pictures of what steppe curvature measured: spectra, slices, and what becomes of them over training."""

import json
from pathlib import Path

from steppe.lm.run import tracking

# Okabe and Ito's colours, as in the loss curve
_BLUE, _VERMILION, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
_NAMES = {"hessian": "H", "ggn": "GGN", "nme": "NME"}


def of_checkpoint(path: Path) -> list[Path]:
    """Draws spectra-STEP.png and, where there are slices, slices-STEP.png beside STEP.json; returns their paths."""
    found = json.loads(path.read_text(encoding="utf-8"))
    title = f"{path.parents[1].resolve().name}, step {found['step']}"
    drawn = [_spectra(found, title, path.with_name(f"spectra-{found['step']}.png"))]
    if "slices" in found:
        drawn.append(_slices(found, title, path.with_name(f"slices-{found['step']}.png")))
    return drawn


def over_training(workdir: str | Path) -> Path | None:
    """Draws curvature/training.png from every STEP.json and the run's curvature records; None where there are none."""
    files = sorted(Path(workdir).glob("curvature/*.json"), key=lambda path: int(path.stem))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    recorded = [r for r in tracking.read(workdir) if r["kind"] == "curvature"]
    if not found and not recorded:
        return None
    figure = _figure(7.5, 5.2)
    shares, norms, eigenvalues, sharpness = _panels(figure, 2, 2, sharex=True)

    # two batches, so two lines: what the run recorded, and what was measured of its checkpoints
    series = {
        ("-", "while training"): [(r["step"], r["all"]["logit_norm"], r["all"]["functional_norm"]) for r in recorded],
        ("--", "checkpoints"): [
            (f["step"], f["summary"]["delta_logit_norm"], f["summary"]["delta_func_norm"]) for f in found
        ],
    }
    for (dash, label), rows in series.items():
        if rows:
            steps, logit, functional = zip(*rows, strict=True)
            share = [b**2 / max(a**2 + b**2, 1e-300) for _, a, b in rows]
            shares.semilogy(steps, share, dash, color=_GREEN, marker=".", label=label)
            norms.semilogy(steps, logit, dash, color=_VERMILION, marker=".", label=f"δ_logit = GGN ε̂, {label}")
            norms.semilogy(steps, functional, dash, color=_GREEN, marker=".", label=f"δ_func = NME ε̂, {label}")
    shares.set_title("share of δ_func in ‖δ_logit‖² + ‖δ_func‖²", loc="left", fontsize=9)
    norms.set_title("norms", loc="left", fontsize=9)
    for axes in (shares, norms):
        axes.legend(frameon=False, fontsize=7)

    at = [f["step"] for f in found]
    for key, label, colour in (("", "H", _BLUE), ("ggn_", "GGN", _VERMILION), ("nme_", "NME", _GREEN)):
        eigenvalues.plot(at, [f["summary"][f"{key}lambda_max"] for f in found], color=colour, marker=".", label=label)
    eigenvalues.set_title("largest eigenvalue", loc="left", fontsize=9)
    for key, label, colour in (
        ("sam_sharpness", "worst case", _BLUE), ("logit_sharpness", "its logit part", _VERMILION),
        ("functional_sharpness", "its functional part", _GREEN), ("average_sharpness", "average case", _GREY),
    ):  # fmt: skip
        sharpness.plot(at, [f["summary"][key] for f in found], color=colour, marker=".", label=label)
    sharpness.set_title("rise of the loss, nats per token", loc="left", fontsize=9)
    for axes in (eigenvalues, sharpness):
        axes.set_xlabel("step")
        if found:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(Path(workdir).resolve().name, fontsize=10, x=0.01, ha="left")
    path = Path(workdir) / "curvature" / "training.png"
    path.parent.mkdir(exist_ok=True)
    return _save(figure, path)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # draws off screen; pyplot would choose a backend for the whole process

    return Figure(figsize=(width, height), layout="constrained")


def _panels(figure, rows: int, columns: int, **shared):
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return figure.subplots(rows, columns, squeeze=False, **shared).ravel()


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def _spectra(found: dict, title: str, path: Path) -> Path:
    figure = _figure(9, 2.9)
    panels = _panels(figure, 1, 3, sharey=True)
    for axes, (key, name), colour in zip(panels, _NAMES.items(), (_BLUE, _VERMILION, _GREEN), strict=True):
        spectrum = found["spectra"][key]
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
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return _save(figure, path)


def _slices(found: dict, title: str, path: Path) -> Path:
    import numpy as np

    slices = found["slices"]
    figure = _figure(9, 3)
    lines, noise, plane = _panels(figure, 1, 3)
    for axes, names in ((lines, {"gradient": _BLUE, "nme": _GREEN}), (noise, {"random": _GREY})):
        for name, colour in names.items():
            label = {"gradient": "along ε̂", "nme": "NME's top eigenvector", "random": "a random direction"}[name]
            axes.plot(slices[name]["at"], _numbers(slices[name]["loss"]), color=colour, marker=".", label=label)
        axes.set_xlabel("distance from θ")
        axes.legend(frameon=False, fontsize=8)
    lines.set_ylabel("loss, nats per token")
    losses = np.array([_numbers(row) for row in slices["plane"]["loss"]])
    if np.isfinite(losses).all() and np.ptp(losses) > 0:
        drawn = plane.contourf(slices["plane"]["gradient"], slices["plane"]["nme"], losses, levels=12, cmap="viridis")
        figure.colorbar(drawn, ax=plane)
    plane.grid(False)
    plane.plot(0, 0, marker="+", color="white")
    plane.set_xlabel("along ε̂")
    plane.set_ylabel("along NME's top eigenvector", fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return _save(figure, path)


def _numbers(values: list) -> list[float]:
    return [float("nan") if value is None else value for value in values]
