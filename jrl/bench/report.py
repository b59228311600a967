"""What a person sees of a benchmark: a table, and a figure of how speed scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jrl import progress

Record = Mapping[str, Any]
ALONE = 0.9  # of a core: below it, others were computing there too
MIN_SPAN = 8.0  # of an axis: its end over its beginning
SCALING = ("env", "policy", "update", "train")  # over environments; "sweep" is over members


def table(records: Sequence[Record]) -> None:
    """Print the records: in colour on a terminal, plain elsewhere."""
    from rich.table import Table

    console = progress.console()
    if not console.is_terminal:
        console = progress.console(width=200)  # a file has no edge to wrap at
    shown = Table(
        "what",
        "envs",
        "seeds",
        "median",
        "spread",
        "once",
        "of the bound",
        "bound by",
        box=None,
        pad_edge=False,
    )
    for column in shown.columns[1:7]:
        column.justify = "right"
    for record in records:
        shown.add_row(*row(record))
    where = records[0]["machine"]
    title = f"{records[0]['algo']} on {records[0]['env']}, {where['device_kind']}"
    console.print(f"{title}, matmul precision {where['matmul_precision']}", highlight=False, style="bold")
    console.print(shown, highlight=False)
    shares = [record["processor_share"] for record in records if "processor_share" in record]
    if where["device"].lower().startswith(("cpu", "tfrt_cpu")) and shares and min(shares) < ALONE:
        console.print(
            f"warning: this process had as little as {min(shares):.0%} of a core; on a machine that is less busy "
            "it is faster, and nearer to the bound.",
            style="yellow",
        )


def row(record: Record) -> list[str]:
    """Return one line of the table."""
    what, sizes = record["benchmark"], [f"{record['num_envs']:,}", f"{record['members']:,}"]
    if what == "compile":
        cold, cached = (
            record[f"{which}_lower_seconds"]["median"] + record[f"{which}_compile_seconds"]["median"]
            for which in ("cold", "cached")
        )
        spread = f"±{record['cold_compile_seconds']['iqr']:.0%}"
        return ["compile, cold", *sizes, f"{cold:.2f} s", spread, f"cached {cached:.2f} s", "", ""]
    if what == "memory":
        program = record["program"]
        total = program["argument"] + program["output"] - program["alias"] + program["temp"]
        return ["memory of the program", *sizes, size(total), "", f"peak {size(_peak(record))}", "", ""]
    if what == "replay":
        kind = "prioritised" if record["prioritized"] else "uniform"
        what = f"replay {record['operation']}, {kind}, {short(_held(record))}"
    roofline = record["roofline"]
    return [
        what,
        *sizes,
        f"{short(record['rate']['median'])} {record['unit']}",
        f"±{record['rate']['iqr']:.0%}",
        seconds(record["seconds"]["median"]),
        f"{roofline['reached']:.1%}",
        roofline["limited_by"].replace("_", " "),
    ]


def _peak(record: Record) -> float:
    """Return the device's peak where it has memory of its own, else the process's."""
    return record["device"].get("peak_bytes_in_use", record["peak_rss"]["running"])


def _held(record: Record) -> int:
    """Return the transitions a replay holds: whole blocks, more than was asked for. Older records lack it."""
    return record.get("held", record["capacity"])


def short(value: float) -> str:
    """Write 2513000 as 2.51 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{_digits(value / unit)}{name}"
    return f"{_digits(value)} " if value % 1 else f"{value:.0f}"


def _digits(value: float) -> str:
    """Write three digits, and of more what is before the point: 1010, not 1.01e+03."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def size(count: float) -> str:
    """Write bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{_digits(count)} {unit}"
        count /= 1024
    return f"{_digits(count)} GiB"


def seconds(value: float) -> str:
    """Write seconds in the unit that suits them."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{_digits(value / unit)} {name}"
    return f"{_digits(value / 1e-6)} µs"


def can_plot(kinds: Sequence[str]) -> bool:
    """Tell whether :func:`plot` has something to draw for these benchmarks."""
    return bool({*SCALING, "sweep", "replay"} & set(kinds))


def plot(records: Sequence[Record], out: Path) -> None:
    """Draw steps per second over environments and over seeds, and the replay's times over its capacity.

    Points are medians, bars the least and the greatest repeat.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from jrl.plots import COLOURS

    panels = []
    scaling = {name: [r for r in records if r["benchmark"] == name] for name in SCALING}
    if any(scaling.values()):
        panels.append(("environments", "environment steps per second", "num_envs", "rate", scaling))
    if sweeps := [r for r in records if r["benchmark"] == "sweep"]:
        label = f"train, {sweeps[0]['num_envs']:,} environments each"
        panels.append(("seeds", "environment steps per second", "members", "rate", {label: sweeps}))
    if replays := [r for r in records if r["benchmark"] == "replay"]:
        groups: dict[str, list[Record]] = {}
        for r in replays:
            kind = "prioritised" if r["prioritized"] else "uniform"
            groups.setdefault(f"{r['operation']}, {kind}", []).append({**r, "held": _held(r)})
        panels.append(("transitions held", "seconds a call", "held", "seconds", groups))

    figure = Figure(figsize=(0.6 + 4.4 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (x_label, y_label, x_name, y_name, groups) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        ticks = sorted({r[x_name] for group in groups.values() for r in group})
        for colour, (label, group) in zip(COLOURS, groups.items(), strict=False):
            if not group:
                continue
            ordered = sorted(group, key=lambda r: r[x_name])
            x = [r[x_name] for r in ordered]
            y = [r[y_name]["median"] for r in ordered]
            below = [r[y_name]["median"] - r[y_name]["min"] for r in ordered]
            above = [r[y_name]["max"] - r[y_name]["median"] for r in ordered]
            axes.errorbar(
                x, y, (below, above), color=colour, marker="o", ms=4, lw=1.6, capsize=2.5, label=label
            )
        axes.set_xscale("log", base=10 if x_name == "held" else 2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [short(tick).replace(" ", "") for tick in ticks])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        if high < MIN_SPAN * low:  # a few percent should look like a few percent
            middle = (low * high) ** 0.5
            axes.set_ylim(middle / MIN_SPAN**0.5, middle * MIN_SPAN**0.5)
        if axes.get_ylim()[1] < 100 * axes.get_ylim()[0]:  # few powers of ten, or none
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(_on_axis(seconds if y_name == "seconds" else short))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    where = records[0]["machine"]
    device = where["cpu"] if where["device_kind"] == "cpu" else where["device_kind"]
    figure.suptitle(f"{records[0]['algo']} on {records[0]['env']}, {device}", fontsize=11, x=0.01, ha="left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def _on_axis(write: Callable[[float], str]) -> Callable[[float, float], str]:
    return lambda value, _: write(value)
