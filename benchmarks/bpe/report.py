"""Tables and plots from the JSON that `benchmarks.bpe` wrote.

    python -m benchmarks.bpe.report OUT.json [--into PAGE.md] [--images docs/images]

Each table stands in the page between `<!-- bpe: NAME -->` and `<!-- end -->` and is replaced; without --into, all are
printed. Numbers are medians over the runs. A table is of one machine, the one that its part was measured on last.
"""

import argparse
import json
import re
import statistics
from pathlib import Path


def machine(content, part):
    """The machine that a part was measured on last; None if it was not."""
    machines = [entry["machine"] for entry in content["measurements"] if entry["job"]["part"] == part]
    return machines[-1] if machines else None


def medians(content, part):
    """(job, median of each number, number of runs) of the measurements of one part, without those that failed."""
    host = machine(content, part)
    for entry in content["measurements"]:
        runs = [run for run in entry["runs"] if "error" not in run]
        if (entry["job"]["part"], entry["machine"]) == (part, host) and runs:
            yield (
                entry["job"],
                {key: statistics.median(run[key] for run in runs) for key in runs[0]},
                len(runs),
            )


def name(job):
    """What was measured, as a table names it."""
    if job["contender"] != "being-vl":
        return {"tokenizers": "tokenizers, 1-D", "recount": "naive recount, pair, α = 0.3"}.get(
            job["contender"], job["contender"]
        )
    return f"being-vl, {job['mode']}, α = {job['alpha']:g}"


def ratios(value, references, key):
    """How many times less than each of the references."""
    if not references or key not in value:
        return ""
    times = [reference[key] / value[key] for reference in references]
    return " (" + ", ".join(f"{ratio:.1f}×" if ratio >= 0.95 else f"{ratio:.1g}×" for ratio in times) + ")"


def comparison(content, part):
    """Contenders, one a line; in brackets, how many times less CPU than `tokenizers` on one thread and on more."""
    measurements = list(medians(content, part))
    references = [value for job, value, _ in measurements if job["contender"] == "tokenizers"]
    for i, (job, value, runs) in enumerate(measurements):
        if i == 0:
            yield (
                f"{job['grids']}: {job['count']} grids, codebook {job['codebook_size']}, {job['merges']} merges, "
                f"1 thread unless told otherwise, median of {runs}\n"
            )
            yield "| | train, CPU s | train, wall s | memory, MB | encode, M ids per CPU s | length |"
            yield "|---|---|---|---|---|---|"
        speed = f"{value['ids'] / value['encode_cpu'] / 1e6:.3g}" if "encode_cpu" in value else "–"
        threads_note = f", {job['threads']} threads" if job.get("threads", 1) > 1 else ""
        yield (
            f"| {name(job)}{threads_note} | {value['train_cpu']:.3g}{ratios(value, references, 'train_cpu')} "
            f"| {value['train_wall']:.3g} | {value['growth']:.0f} | {speed}{ratios(value, references, 'encode_cpu')} "
            f"| {value['tokens'] / value['ids']:.4f} |"
        )


def images(content):
    """Time and memory against number of grids."""
    yield "| grids | | threads | train, CPU s | train, wall s | peak memory, MB | bytes per id |"
    yield "|---|---|---|---|---|---|---|"
    for job, value, _ in medians(content, "images"):
        times = f"{value['train_cpu']:.3g} | {value['train_wall']:.3g}"
        peak, per_id = f"{value['peak']:.0f}", f"{value['growth'] * 2**20 / value['ids']:.1f}"
        yield f"| {job['count']:,} | {name(job)} | {job['threads']} | {times} | {peak} | {per_id} |"


def threads(content):
    """How much faster several threads are, and what as many cores give to programs that share nothing."""
    measurements = list(medians(content, "threads"))
    single_walls = [
        value["train_wall"] for job, value, _ in measurements if job["threads"] == 1 and "programs" not in job
    ]
    yield "| grids | programs at once | threads of each | train, wall s | CPU s of each | speed of all | runs |"
    yield "|---|---|---|---|---|---|---|"
    for job, value, runs in measurements:
        programs, wall = job.get("programs", 1), value["train_wall"]
        speed = f"{programs * single_walls[0] / wall:.2f}×" if single_walls else "–"
        yield (
            f"| {job['count']:,} | {programs} | {job['threads']} | {wall:.3g} | {value['train_cpu']:.3g} | {speed} "
            f"| {runs} |"
        )


def alpha(content):
    """What α costs."""
    measurements = list(medians(content, "alpha"))
    cpu_at_zero = {job["mode"]: value["train_cpu"] for job, value, _ in measurements if job["alpha"] == 0}
    yield "| mode | α | train, CPU s | of α = 0 | length |"
    yield "|---|---|---|---|---|"
    for job, value, _ in measurements:
        share = f"{value['train_cpu'] / cpu_at_zero[job['mode']]:.2f}×" if job["mode"] in cpu_at_zero else "–"
        yield (
            f"| {job['mode']} | {job['alpha']:g} | {value['train_cpu']:.3f} | {share} "
            f"| {value['tokens'] / value['ids']:.4f} |"
        )


def worst_table(content):
    """Inputs that could turn something quadratic."""
    yield "| grids | mode | train, CPU s | encode, CPU s | growth of memory, MB |"
    yield "|---|---|---|---|---|"
    for job, value, _ in medians(content, "worst"):
        yield (
            f"| {job['grids']} | {job['mode']} | {value['train_cpu']:.3f} | {value['encode_cpu']:.3f} "
            f"| {value['growth']:.0f} |"
        )


def encode(content):
    """Threads and latency."""
    yield "| mode | threads | M ids per CPU s | M ids per s | one grid, median ms | one grid, CPU ms |"
    yield "|---|---|---|---|---|---|"
    for job, value, _ in medians(content, "encode"):
        latencies = [f"{value[key]:.4f}" if key in value else "–" for key in ("latency_wall", "latency_cpu")]
        yield (
            f"| {job['mode']} | {job['threads']} | {value['ids'] / value['encode_cpu'] / 1e6:.1f} "
            f"| {value['ids'] / value['encode_wall'] / 1e6:.1f} | {latencies[0]} | {latencies[1]} |"
        )


def failures(content):
    """What could not be measured, and why."""
    for entry in content["measurements"]:
        for error in sorted({run["error"] for run in entry["runs"] if "error" in run}):
            yield f"- {name(entry['job'])}: {error}"


TABLES = {
    "compare": lambda content: comparison(content, "compare"),
    "small": lambda content: comparison(content, "small"),
    "images": images,
    "threads": threads,
    "alpha": alpha,
    "worst": worst_table,
    "encode": encode,
    "failures": failures,
}


def draw(content, folder):
    """`bpe-merges.svg` and `bpe-grids.svg`."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "svg.hashsalt": "being-vl",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }

    def lines(part, x_axis, key):
        """Points by contender and number of threads."""
        points = {}
        for job, value, _ in medians(content, part):
            label = name(job) + (f", {job['threads']} threads" if job["threads"] > 1 else "")
            points.setdefault(label, []).append((job[x_axis], key(value)))
        return {label: sorted(line) for label, line in points.items()}

    def figure(file, panels):
        fig, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
        for axis, (title, x_axis, scale, part, key) in zip(axes, panels, strict=True):
            for label, points in lines(part, x_axis, key).items():
                axis.plot(*zip(*points, strict=True), marker=".", label=label)
            axis.set(title=title, xlabel="grids" if x_axis == "count" else x_axis, xscale=scale, yscale=scale)
            if scale == "linear":
                axis.set_ylim(bottom=0)
        axes[0].legend(fontsize=7)
        fig.savefig(folder / file, metadata={"Date": None})
        plt.close(fig)

    panels = {
        "merges": [
            ("training, CPU s", "merges", "linear", "merges", lambda value: value["train_cpu"]),
            (
                "length after encoding",
                "merges",
                "linear",
                "merges",
                lambda value: value["tokens"] / value["ids"],
            ),
        ],
        "images": [
            ("training, wall s", "count", "log", "images", lambda value: value["train_wall"]),
            ("peak memory, MB", "count", "log", "images", lambda value: value["peak"]),
        ],
    }
    for part, file in (("merges", "bpe-merges.svg"), ("images", "bpe-grids.svg")):
        if any(medians(content, part)):
            figure(file, panels[part])


def main():
    """Print the tables, or put them into a page; draw the plots if a folder for them is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--into", type=Path, help="page with markers")
    parser.add_argument("--images", type=Path, help="folder for the plots")
    options = parser.parse_args()
    content = json.loads(options.results.read_text())
    tables = {}
    for part, table in TABLES.items():
        host = machine(content, part)
        where = f"{host['processor']}, {host['cores']} cores, tokenizers {host['tokenizers']}" if host else ""
        tables[part] = "\n".join([*([where, ""] if where else []), *table(content)])
    if options.into is None:
        for part, text in tables.items():
            print(f"## {part}\n{text}\n")
    else:
        page = options.into.read_text()
        for part, text in tables.items():
            pattern = rf"(<!-- bpe: {part} -->\n).*?(<!-- end -->)"
            page = re.sub(pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
        options.into.write_text(page)
    if options.images is not None:
        draw(content, options.images)


if __name__ == "__main__":
    main()
