"""Rows as a run would record them, with made-up numbers, for tests of the report and the figures."""

import hashlib

SHAPE = {
    "batch": 1, "length": 128, "median_ms": 10.0, "low_ms": 9.8, "high_ms": 10.2, "p5_ms": 9.5, "p95_ms": 11.0,
    "dense_ms": 10.0, "ratio": 1.01, "ratio_low": 0.99, "ratio_high": 1.03, "aa_ratio": 1.0, "aa_low": 0.98,
    "aa_high": 1.02, "noise_floor": 0.02,
}  # fmt: skip
PROVENANCE = {
    "code": "0.1.0", "packages": {"torch": "2.13.0"}, "machine": {
        "cpu": "a cpu", "cores": 2, "memory_bytes": 2**34, "os": "Linux", "gpu": None, "python": "3.11.7",
    },
    "device": "cpu", "dtype": "float32", "threads": 2, "model_hash": "m" * 16, "data_hash": "d" * 16,
    "technique_version": 1, "measure_version": 1, "started": "2026-01-02T03:04:05+00:00", "wall_s": 2.0,
    "split": "test", "n_examples": 200,
}  # fmt: skip


def key_of(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def row(
    technique="dense", value=0.9, *, sparsity=None, p=None, model="some/encoder", task="some-task",
    metric="accuracy", recovery=None, collapsed=None, notebook="02_pruning", pattern=None, **changed,
) -> dict:  # fmt: skip
    """One valid row; `p` None means the dense baseline."""
    settings = ({"sparsity": sparsity} if sparsity is not None else {}) | (
        {"recovery": {"steps": recovery}} if recovery else {}
    )
    settings |= {"pattern": pattern} if pattern else {}
    spread = 0.02 if metric == "accuracy" else 1.0
    fraction, baseline = (0.5 if pattern else sparsity or 0.0), p is None
    kept = 1 - 0.8 * fraction
    quality = {
        "metric": metric, "value": value, "low": value - spread, "high": value + spread, "n": 200,
        "higher_is_better": metric == "accuracy", "floor": 0.5 if metric == "accuracy" else 500.0,
        "collapsed": collapsed, "secondary": {},
        "difference": None if baseline else {
            "value": value - 0.9, "low": value - 0.9 - spread, "high": value - 0.9 + spread, "p": p,
            "test": "mcnemar", "n": 200,
        },
    }  # fmt: skip
    formats = {
        "dense": 4_000_000, "dense_zstd": int(3_700_000 * kept), "bitmask": int(4_125_000 * kept),
        "csr_int32": int(8_000_000 * (1 - fraction)), "csr_int64": int(12_000_000 * (1 - fraction)),
    }  # fmt: skip
    made = {
        "key": key_of(technique, settings, model, task), "notebook": notebook, "profile": "pocket", "task": task,
        "model": model, "family": "bert", "technique": technique, "settings": settings, "seed": 0,
        "achieved": {"layers": 4} | ({"sparsity": fraction} if sparsity is not None else {}),
        "quality": quality,
        "latency": {
            "device": "cpu", "dtype": "float32", "threads": 2, "calls": 30, "signature": "s" * 16,
            "measured_on": None,
            "shapes": {"batch1": SHAPE | ({"ratio": None, "ratio_low": None, "ratio_high": None} if baseline else {})},
        },
        "memory": {
            "parameters": 1_000_000, "nonzero_parameters": int(1_000_000 * kept), "file_bytes": 4_000_100,
            "formats": formats, "peak_bytes": None, "peak_kind": None,
        },
        "compute": {
            "flops": 10**9, "shape": "batch1", "gflops_per_s": 50.0, "ceiling_gflops": 100.0,
            "matmul_share": 0.5, "bandwidth_share": 0.1,
        },
        "verdict": {
            "quality": "baseline" if baseline else "worse", "size": "baseline" if baseline else "no change",
            "latency": {"batch1": "baseline" if baseline else "no measurable change"},
        },
        "provenance": dict(PROVENANCE),
    }  # fmt: skip
    return made | changed


def kernel_row() -> dict:
    timings = [
        {"kernel": kernel, "rows": 128, "sparsity": s, "median_ms": 1.0, "ratio": r, "ratio_low": r * 0.97,
         "ratio_high": r * 1.03, "noise_floor": 0.02}
        for kernel, ratios in {"dense_fp32": (1, 1), "csr": (2.0, 0.25), "dense_bf16": (1.0, 1.0)}.items()
        for s, r in zip((0.5, 0.99), ratios, strict=True)
    ]  # fmt: skip
    return row("kernels", task="none", achieved={"layer": "x", "timings": timings}, **EMPTY)


EMPTY = dict.fromkeys(("quality", "latency", "memory", "compute", "verdict"))


def compared(first, second, difference, first_settings, second_settings, *, p, metric="accuracy") -> dict:
    """A tested difference between two rows."""
    found = {
        "first": {"technique": first, "settings": first_settings},
        "second": {"technique": second, "settings": second_settings},
        "metric": metric, "values": [0.9 + difference, 0.9], "higher_is_better": metric == "accuracy",
        "difference": {"value": difference, "low": difference - 0.02, "high": difference + 0.02, "p": p,
                       "test": "mcnemar", "n": 200},
    }  # fmt: skip
    made = row("paired-difference", achieved=found, **EMPTY)
    return made | {"key": key_of(first, second, first_settings, second_settings)}


def scan_row() -> dict:
    """A sensitivity scan of two blocks."""
    change = {"encoder.0.attention": [0.01, 0.5], "encoder.0.feed-forward": [0.02, 0.25],
              "encoder.1.attention": [0.01, 0.03], "encoder.1.feed-forward": [0.01, 0.04]}  # fmt: skip
    found = {"levels": [0.5, 0.9], "weights": dict.fromkeys(change, 100), "change": change}
    return row("sensitivity", achieved=found, **EMPTY)


def pruning_rows() -> list[dict]:
    """A dense model, three rules, a pattern, recovery with its control, tested differences, a scan, kernel times."""
    return [
        row(),
        row("random", 0.62, sparsity=0.5, p=0.0001),
        row("random", 0.5, sparsity=0.9, p=0.0001, collapsed="predicts one class"),
        row("magnitude-layer", 0.897, sparsity=0.5, p=0.6),
        row("magnitude-layer", 0.7, sparsity=0.9, p=0.0002),
        row("magnitude-layer", 0.899, sparsity=0.9, p=0.8, recovery=30),
        row("dense", 0.91, p=0.3, recovery=30),
        row("wanda", 0.898, sparsity=0.5, p=0.7),
        row("wanda", 0.82, pattern="2:4", p=0.001),
        compared("wanda", "magnitude-layer", 0.001, {"sparsity": 0.5}, {"sparsity": 0.5}, p=0.8),
        compared("wanda", "wanda", -0.078, {"pattern": "2:4"}, {"sparsity": 0.5}, p=0.001),
        scan_row(),
        kernel_row(),
    ]


def structured(technique, value, settings, *, p, share=0.7, **changed) -> dict:
    """A row of structured pruning: `share` of the dense file's bytes, with what that technique says it did."""
    blocks = ("encoder.0", "encoder.1")
    heads, ffn = round(4 * (settings.get("heads") or 1)), round(48 * (settings.get("ffn") or 1))
    achieved = {
        "heads-ffn": {"heads_kept": {f"{b}.a": list(range(heads)) for b in blocks},
                      "ffn_kept": dict.fromkeys(blocks, ffn), "parameters_share": share},
        "drop-blocks": {"dropped": {"encoder": [1]}, "influence": {"encoder": [0.3, 0.1]},
                        "blocks_left": {"encoder": 1}},
        "vocabulary": {"vocabulary": 3000, "vocabulary_before": 30000, "tokens_seen": 2000},
        "dense": {},
    }["heads-ffn" if technique == "textpruner" else technique]  # fmt: skip
    made = row(
        technique, value, p=p, recovery=changed.pop("recovery", None), notebook="03_structured_pruning"
    )
    made["settings"] |= settings
    made["achieved"] = {"layers": 4} | achieved
    made["memory"] |= {"file_bytes": int(4_000_100 * share), "parameters": int(1_000_000 * share)}
    return made | {"key": key_of(technique, made["settings"])} | changed


def structured_rows() -> list[dict]:
    """A sweep over heads and channels, ways of choosing, depth, vocabulary, and where the time goes."""
    home, text = {"notebook": "03_structured_pruning"}, {"calibration": {"n": 64, "length": 128, "seed": 0}}
    both = {"heads": 0.5, "ffn": 0.5, "n_iters": 4} | text
    shape = SHAPE | {"ratio": 0.6, "ratio_low": 0.58, "ratio_high": 0.63}
    timed = structured("heads-ffn", 0.88, both, p=0.3, share=0.6)
    timed["latency"] = timed["latency"] | {"shapes": {"batch8": shape}}
    analyses = {
        "head-importance": {"attentions": [{"label": f"block {i}", "heads": [0.1, 0.2, 0.05, 0.01]} for i in (0, 1)]},
        "block-influence": {"influence": {"encoder": [0.3, 0.1]}},
        "block-replacement": {"dense": 0.5, "replaced": [[0.5, 0.8], [0.7, 0.5]], "null": [0.9, 0.6]},
        "time-shares": {"shape": "batch8", "flops": [10**9, 5 * 10**8], "shares": [
            {"products": 0.8, "attention": 0.1, "rest": 0.1}, {"products": 0.7, "attention": 0.1, "rest": 0.2}]},
    }  # fmt: skip
    asked = {"block-replacement": {"stack": "encoder"}, "time-shares": {"heads": 0.5, "ffn": 0.5}}
    return [
        row(**home),
        timed,
        structured("heads-ffn", 0.91, {"heads": 0.5, "n_iters": 4} | text, p=0.6, share=0.8),
        structured("heads-ffn", 0.7, {"ffn": 0.5, "n_iters": 4} | text, p=1e-6, share=0.75),
        structured(
            "heads-ffn", 0.5, both | {"n_iters": 1}, p=0.0001, collapsed="predicts one class", share=0.6
        ),
        structured("heads-ffn", 0.89, both | {"calibration": {"n": 64, "scored": True}}, p=0.5, share=0.59),
        structured("textpruner", 0.87, both, p=0.2, share=0.6),
        structured("drop-blocks", 0.6, {"blocks": 1} | text, p=0.0001, share=0.55),
        structured("drop-blocks", 0.85, {"blocks": 1} | text, p=0.01, share=0.55, recovery=20),
        structured("dense", 0.91, {}, p=0.4, share=1.0, recovery=20),
        structured("vocabulary", 0.899, {"calibration": {"n": 2000}}, p=0.9, share=0.5),
        compared("heads-ffn", "heads-ffn", -0.4, both | {"n_iters": 1}, both, p=0.0001) | home,
        compared("heads-ffn", "textpruner", 0.01, both, both, p=0.7) | home,
        *(
            row(name, achieved=found, settings=asked.get(name, {}), key=key_of(name), **EMPTY, **home)
            for name, found in analyses.items()
        ),
    ]


def trained(layers, phi, seed, value, *, p, metric="perplexity", seconds=10.0) -> dict:
    """A model trained from scratch: `value` on held-out text, a loss that falls from 6 to 4 in `seconds`."""
    made = row("architecture", value, p=p, metric=metric, notebook="08_architecture_training")
    made["settings"] = {"layers": layers, "phi": phi, "scale": "pocket", "tokens": 1000}
    made["seed"] = seed
    validation = [[s, 6 - 0.2 * s, s * seconds / 10, 100 * s] for s in range(1, 11)]
    made["achieved"] = {
        "layers": layers, "parameters": 100_000 + 16_000 * layers, "validation": validation, "curve": validation,
        "seconds": seconds, "tokens": 1000, "tokens_per_s": 1000 / seconds,
    }  # fmt: skip
    interval = {"value": value / 10, "low": value / 10 - 0.1, "high": value / 10 + 0.1}
    made["quality"]["secondary"] = {"bits_per_byte": interval, "rougeL": interval}
    made["latency"]["shapes"] = {"prefill_b1": SHAPE, "decode_b1": SHAPE}
    made["verdict"]["latency"] = {"prefill_b1": "no measurable change", "decode_b1": "no measurable change"}
    return made | {"key": key_of(layers, phi, seed, metric)}


def architecture_rows() -> list[dict]:
    """Five layers with φ: clearly better than without over three seeds, no different from six layers."""
    home, values = {"notebook": "08_architecture_training"}, {
        (5, "none"): (100.0, 101.0, 99.0), (5, "shared"): (90.0, 91.5, 88.5), (6, "none"): (90.0, 89.0, 91.0),
    }  # fmt: skip
    counts = {"none": {"5": 128_789_504, "6": 1}, "shared": {"5": 128_872_064, "6": 3}}
    named = {"layers": 5, "phi": "shared"}, {"layers": 5, "phi": "none"}
    return [
        row(value=100.0, metric="perplexity", **home),
        *(
            trained(*shape, seed, value, p=0.01, seconds=shape[0] * 2.0)
            for shape, several in values.items()
            for seed, value in enumerate(several)
        ),
        trained(5, "none", 0, 3.0, p=0.5, metric="bleu"),
        compared("architecture", "architecture", -10, *named, p=0.001, metric="perplexity") | home,
        row("parameter-counts", achieved={"counts": counts}, **EMPTY, **home),
    ]
