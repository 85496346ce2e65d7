"""Print RESULTS.md from results/*.json: every figure that the documentation may quote, missed bars included.

python -m benchmarks.results
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
MACHINES = {"cpu2": "2 CPU cores", "h200": "one H200", "h100": "one H100"}
HEAD = """# What was measured

Printed from `results/*.json` by `python -m benchmarks.results`; each line names the command that made it. CPU times are
noisy: both sides of a ratio alternate in one run, and medians are quoted. A missed bar stays here as missed.
"""


def render() -> str:
    lines = [HEAD]
    for path in sorted((HERE / "results").glob("*.json")):
        name, machine = path.stem.split(".")
        rows = json.loads(path.read_text("utf-8"))
        if any(row.get("dry") for row in rows):
            raise ValueError(f"{path} is of a dry run, which measures nothing; remove it")
        lines += [f"## {name}, on {MACHINES.get(machine, machine)}", ""]
        lines += ["| figure | case | ours | peer | ratio | bar | | runs, spread |", "|---|---|---|---|---|---|---|---|"]
        for row in rows:
            if row.get("failed"):
                why = f"failed: {_cell(row['failed'])}"
                lines.append(f"| {row['figure']} | {row['case']} | {why} | | | | **missed** | |")
                continue
            peer = "" if row["peer"] is None else f"{row['peer']:.4g} {row['unit']}"
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            verdict = ("holds" if row["holds"] else "**missed**") if row["bar"] else ""
            ours = "" if row["ours"] is None else f"{row['ours']:.4g} {row['unit']}"
            lines.append(
                f"| {row['figure']} | {row['case']} | {ours} | {peer} | {ratio} "
                f"| {row['bar']} | {verdict} | {row['runs']}, {row['spread']:.0%} |"
            )
        first = rows[0]
        versions = ", ".join(f"{package} {number}" for package, number in first["versions"].items())
        lines += ["", f"`{first['command']}`, {first['date']}: {versions}", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A message in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(render(), encoding="utf-8")
