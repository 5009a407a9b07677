"""How well the dictionary reads the models: the numbers of an evaluation."""

from __future__ import annotations

from crosscoder.analysis.markup import plain, section, table
from crosscoder.analysis.report.data import ReportData, optional


def numbers(data: ReportData) -> str:
    """The section: reconstruction, sparsity and cross-entropy, by source."""
    e = data.evaluation
    tiles = {
        "fraction of variance explained": f"{e['fve']:.3f}",
        "active latents per row": f"{e['l0']:.1f}",
        "latents that never fire": f"{e['dead_fraction']:.1%}",
        "cross-entropy recovered, at least": optional(e["ce_recovered_min"]),
        "held-out rows": f"{e['num_rows']:,}",
    }
    shown = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles.items())
    rows = [
        [
            f"<code>{plain(key)}</code>",
            f"{s['fve']:.3f}",
            *(optional(s.get(name)) for name in ("ce_clean", "ce_spliced", "ce_zero_ablated", "ce_mean_ablated")),
            *(optional(s.get(name)) for name in ("ce_recovered", "ce_recovered_mean")),
        ]
        for key, s in e["sources"].items()
    ]
    head = ["source", "FVE", "CE clean", "CE spliced", "CE zero", "CE mean", "recovered (zero)", "recovered (mean)"]
    note = (
        "On held-out text. Cross-entropy (CE) in nats per token, with one source at a time replaced by its "
        "reconstruction (spliced), by zero, or by its mean; dropped positions keep their own activation."
    )
    return section(
        "How well it reads the models",
        f'<div class="numbers">{shown}</div>',
        table(head, rows),
        identity="numbers",
        note=note,
    )
