"""Rows as a run would record them, with made-up numbers, for tests of the report and the figures."""

import hashlib

SHAPE = {
    "batch": 1,
    "length": 128,
    "median_ms": 10.0,
    "low_ms": 9.8,
    "high_ms": 10.2,
    "p5_ms": 9.5,
    "p95_ms": 11.0,
    "dense_ms": 10.0,
    "ratio": 1.01,
    "ratio_low": 0.99,
    "ratio_high": 1.03,
    "aa_ratio": 1.0,
    "aa_low": 0.98,
    "aa_high": 1.02,
    "noise_floor": 0.02,
}
PROVENANCE = {
    "code": "0.1.0",
    "packages": {"torch": "2.13.0"},
    "machine": {
        "cpu": "a cpu",
        "cores": 2,
        "memory_bytes": 2**34,
        "os": "Linux",
        "gpu": None,
        "python": "3.11.7",
    },
    "device": "cpu",
    "dtype": "float32",
    "threads": 2,
    "model_hash": "m" * 16,
    "data_hash": "d" * 16,
    "technique_version": 1,
    "measure_version": 1,
    "started": "2026-01-02T03:04:05+00:00",
    "wall_s": 2.0,
    "split": "test",
    "n_examples": 200,
}


def key_of(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def row(
    technique="dense",
    value=0.9,
    *,
    sparsity=None,
    p=None,
    model="some/encoder",
    task="some-task",
    metric="accuracy",
    recovery=None,
    collapsed=None,
    notebook="02_pruning",
    pattern=None,
    **changed,
) -> dict:
    """One valid row; `p` None means the dense baseline."""
    settings = ({"sparsity": sparsity} if sparsity is not None else {}) | (
        {"recovery": {"steps": recovery}} if recovery else {}
    )
    settings |= {"pattern": pattern} if pattern else {}
    spread = 0.02 if metric == "accuracy" else 1.0
    fraction, baseline = (0.5 if pattern else sparsity or 0.0), p is None
    kept = 1 - 0.8 * fraction
    quality = {
        "metric": metric,
        "value": value,
        "low": value - spread,
        "high": value + spread,
        "n": 200,
        "higher_is_better": metric == "accuracy",
        "floor": 0.5 if metric == "accuracy" else 500.0,
        "collapsed": collapsed,
        "secondary": {},
        "difference": None
        if baseline
        else {
            "value": value - 0.9,
            "low": value - 0.9 - spread,
            "high": value - 0.9 + spread,
            "p": p,
            "test": "mcnemar",
            "n": 200,
        },
    }
    formats = {
        "dense": 4_000_000,
        "dense_zstd": int(3_700_000 * kept),
        "bitmask": int(4_125_000 * kept),
        "csr_int32": int(8_000_000 * (1 - fraction)),
        "csr_int64": int(12_000_000 * (1 - fraction)),
    }
    made = {
        "key": key_of(technique, settings, model, task),
        "notebook": notebook,
        "profile": "pocket",
        "task": task,
        "model": model,
        "family": "bert",
        "technique": technique,
        "settings": settings,
        "seed": 0,
        "achieved": {"layers": 4} | ({"sparsity": fraction} if sparsity is not None else {}),
        "quality": quality,
        "latency": {
            "device": "cpu",
            "dtype": "float32",
            "threads": 2,
            "calls": 30,
            "signature": "s" * 16,
            "measured_on": None,
            "shapes": {
                "batch1": SHAPE | ({"ratio": None, "ratio_low": None, "ratio_high": None} if baseline else {})
            },
        },
        "memory": {
            "parameters": 1_000_000,
            "nonzero_parameters": int(1_000_000 * kept),
            "file_bytes": 4_000_100,
            "formats": formats,
            "peak_bytes": None,
            "peak_kind": None,
        },
        "compute": {
            "flops": 10**9,
            "shape": "batch1",
            "gflops_per_s": 50.0,
            "ceiling_gflops": 100.0,
            "matmul_share": 0.5,
            "bandwidth_share": 0.1,
        },
        "verdict": {
            "quality": "baseline" if baseline else "worse",
            "size": "baseline" if baseline else "no change",
            "latency": {"batch1": "baseline" if baseline else "no measurable change"},
        },
        "provenance": dict(PROVENANCE),
    }
    return made | changed


def kernel_row() -> dict:
    timings = [
        {
            "kernel": kernel,
            "rows": 128,
            "sparsity": s,
            "median_ms": 1.0,
            "ratio": r,
            "ratio_low": r * 0.97,
            "ratio_high": r * 1.03,
            "noise_floor": 0.02,
        }
        for kernel, ratios in {"dense_fp32": (1, 1), "csr": (2.0, 0.25), "dense_bf16": (1.0, 1.0)}.items()
        for s, r in zip((0.5, 0.99), ratios, strict=True)
    ]
    return row("kernels", task="none", achieved={"layer": "x", "timings": timings}, **EMPTY)


EMPTY = dict.fromkeys(("quality", "latency", "memory", "compute", "verdict"))


def compared(first, second, difference, first_settings, second_settings, *, p, metric="accuracy") -> dict:
    """A tested difference between two rows."""
    found = {
        "first": {"technique": first, "settings": first_settings},
        "second": {"technique": second, "settings": second_settings},
        "metric": metric,
        "values": [0.9 + difference, 0.9],
        "higher_is_better": metric == "accuracy",
        "difference": {
            "value": difference,
            "low": difference - 0.02,
            "high": difference + 0.02,
            "p": p,
            "test": "mcnemar",
            "n": 200,
        },
    }
    made = row("paired-difference", achieved=found, **EMPTY)
    return made | {"key": key_of(first, second, first_settings, second_settings)}


def scan_row() -> dict:
    """A sensitivity scan of two blocks."""
    change = {
        "encoder.0.attention": [0.01, 0.5],
        "encoder.0.feed-forward": [0.02, 0.25],
        "encoder.1.attention": [0.01, 0.03],
        "encoder.1.feed-forward": [0.01, 0.04],
    }
    found = {"levels": [0.5, 0.9], "weights": dict.fromkeys(change, 100), "change": change}
    return row("sensitivity", achieved=found, **EMPTY)


def pruning_rows() -> list[dict]:
    """Return a dense model, criteria, a pattern, recovery with its control, tests, a scan, kernel times."""
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
    """Return a row of structured pruning: `share` of the dense bytes, with what the technique reports."""
    blocks = ("encoder.0", "encoder.1")
    heads, ffn = round(4 * (settings.get("heads") or 1)), round(48 * (settings.get("ffn") or 1))
    achieved = {
        "heads-ffn": {
            "heads_kept": {f"{b}.a": list(range(heads)) for b in blocks},
            "ffn_kept": dict.fromkeys(blocks, ffn),
            "parameters_share": share,
        },
        "drop-blocks": {
            "dropped": {"encoder": [1]},
            "influence": {"encoder": [0.3, 0.1]},
            "blocks_left": {"encoder": 1},
        },
        "vocabulary": {"vocabulary": 3000, "vocabulary_before": 30000, "tokens_seen": 2000},
        "dense": {},
    }["heads-ffn" if technique == "textpruner" else technique]
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
        "head-importance": {
            "attentions": [{"label": f"block {i}", "heads": [0.1, 0.2, 0.05, 0.01]} for i in (0, 1)]
        },
        "block-influence": {"influence": {"encoder": [0.3, 0.1]}},
        "block-replacement": {"dense": 0.5, "replaced": [[0.5, 0.8], [0.7, 0.5]], "null": [0.9, 0.6]},
        "time-shares": {
            "shape": "batch8",
            "flops": [10**9, 5 * 10**8],
            "shares": [
                {"products": 0.8, "attention": 0.1, "rest": 0.1},
                {"products": 0.7, "attention": 0.1, "rest": 0.2},
            ],
        },
    }
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


def student_row(student, value, *, p, seed=0, way="taught", share=0.6, collapsed=None, **asked) -> dict:
    """A student, or with `student` "pruned" a pruned model: `way` is "taught", "hard", "untrained" or
    "other".
    """
    settings = (
        {"heads": 0.5, "ffn": 0.5, "n_iters": 4}
        if student == "pruned"
        else {"student": student, "blocks": 0.5}
    )
    technique, budget = "heads-ffn", {"steps": 20, "learning_rate": 1e-4, "batch_size": 8}
    if student == "pruned":
        settings |= (
            {}
            if way == "untrained"
            else {"recovery": budget | ({"teacher": True} if way == "taught" else {})}
        )
    else:
        technique = "student" if way == "untrained" else "distil"
        settings |= {} if way == "untrained" else {"training": budget}
        settings |= ({"soft_weight": 0.0, "hard_weight": 1.0} if way == "hard" else {}) | asked
    made = row(technique, value, p=p, collapsed=collapsed, notebook="04_distillation", seed=seed)
    made["settings"] = settings
    curve = {
        "train": [[1, 2.0], [2, value]],
        "validation": [[1, 1.0], [2, 1 - value + seed / 10]],
        "seconds": 1.0,
        "tokens": 9,
    } | ({} if student == "pruned" else {"divergence": [[1, 0.5], [2, 0.1]]})
    kept = (
        {"curve": curve}
        if technique == "distil"
        else {"recovery_curve": curve}
        if "recovery" in settings
        else {}
    )
    made["achieved"] = (
        {"layers": 3, "parameters_share": share}
        | kept
        | ({} if student == "pruned" else {"blocks": {"encoder": 3}})
    )
    made["memory"] |= {"file_bytes": int(4_000_100 * share), "parameters": int(1_000_000 * share)}
    shape = SHAPE | {"batch": 8, "median_ms": 5.0, "ratio": 0.5, "ratio_low": 0.48, "ratio_high": 0.53}
    made["latency"] = made["latency"] | {"shapes": {"batch8": shape}} if student == "copied" else None
    return made | {"key": key_of(technique, settings, seed)}


def tested(first, second, difference, *, p) -> dict:
    """The paired difference of two rows, by their keys."""
    made = compared(
        first["technique"], second["technique"], difference, first["settings"], second["settings"], p=p
    )
    keys = {"first": first["key"], "second": second["key"]}
    return made | {"settings": keys, "notebook": "04_distillation", "key": key_of(keys)}


def distillation_rows(seeds=(0, 1)) -> list[dict]:
    """Students of two kinds and a pruned model, each way, over seeds; other losses; a timed cache."""
    made = [
        row(notebook="04_distillation"),
        student_row("copied", 0.7, p=1e-4, way="untrained"),
        student_row("pruned", 0.6, p=1e-4, way="untrained"),
    ]
    for seed in seeds:
        taught = student_row("copied", 0.86 + seed / 50, p=0.001, seed=seed)
        hard = student_row("copied", 0.84, p=1e-4, seed=seed, way="hard")
        weak = [
            student_row("random", 0.5, p=1e-6, seed=seed, way=way, collapsed="predicts one class", share=0.6)
            for way in ("untrained", "taught", "hard")
        ]
        again = [student_row("pruned", 0.899, p=0.8, seed=seed, way=way) for way in ("taught", "hard")]
        made += [
            taught,
            hard,
            tested(taught, hard, 0.02 + seed / 50, p=0.2 if seed == 0 else 0.001),
            *weak,
            tested(weak[1], weak[2], 0.0, p=1.0),
            *again,
            tested(*again, 0.0, p=1.0),
        ]
    usual = next(one for one in made if one["technique"] == "distil")
    for asked in (
        {"temperature": 8.0},
        {"soft_weight": 0.5, "hard_weight": 0.5},
        {"matches": "hidden+attention"},
    ):
        other = student_row("copied", 0.87, p=0.01, **asked)
        made += [other, tested(other, usual, 0.01, p=0.6)]
    found = {"asked_s": [10.0, 10.4], "kept_s": [6.0, 6.2], "loss_gap": 1e-7}
    asked = {"examples": 64, "steps": 32, "batch_size": 8}
    home = {"notebook": "04_distillation", "key": key_of("teacher-cache")}
    return [*made, row("teacher-cache", achieved=found, settings=asked, **EMPTY, **home)]


def moefication_rows() -> list[dict]:
    """Return sparse activations, ReLU with its control, experts of two clusterings and routers, a time."""
    home = {"notebook": "07_moefication"}

    def experts(value, share, *, p, clustering="balanced-kmeans", router="mlp", active=8, **changed) -> dict:
        settings = {"experts": 16, "active": active, "clustering": clustering, "router": router}
        found = {"layers": 4, "ffn_flops_share": share, "mass": 0.6, "mass_oracle": 0.65, "recall": 0.8}
        key = key_of("moefy", settings)
        return row(
            "moefy",
            value,
            p=p,
            settings=settings,
            achieved=found,
            key=key,
            **(home | {"latency": None} | changed),
        )

    timed = experts(0.895, 0.52, p=0.6)
    timed["latency"] = row()["latency"] | {
        "shapes": {"batch1": SHAPE | {"ratio": 1.1, "ratio_low": 1.06, "ratio_high": 1.14}}
    }
    timed["verdict"]["latency"] = {"batch1": "slower"}
    blocks = [
        {
            "stack": "encoder",
            "index": i,
            "zero": 0.02 * i,
            "below": [0.1, 0.2, 0.5],
            "neurons_90": 0.3 + 0.1 * i,
            "fixed_90": 0.6,
        }
        for i in (0, 1)
    ]
    sparse = {"thresholds": [0.01, 0.1, 0.5], "blocks": blocks}
    zeros = {"layers": 2, "zero_before": 0.01, "zero_swapped": 0.6, "zero_after": 0.75}
    budget = {"steps": 20, "learning_rate": 1e-4, "batch_size": 8}
    channels = structured("heads-ffn", 0.8, {"ffn": 0.5, "n_iters": 4}, p=0.001, latency=None) | home
    names = ("clustering", "router")
    usual, random, oracle = (
        {"experts": 16, "active": 8} | dict(zip(names, pair, strict=True))
        for pair in (("balanced-kmeans", "mlp"), ("random", "mlp"), ("balanced-kmeans", "oracle"))
    )
    return [
        row(**home),
        timed,
        experts(0.7, 0.27, p=1e-6, active=4),
        experts(0.85, 0.52, p=0.01, clustering="random"),
        experts(0.9, 0.75, p=0.9, router="oracle"),
        channels,
        row(
            "relufy",
            0.88,
            p=0.03,
            settings={"training": budget},
            achieved=zeros,
            key=key_of("relufy"),
            **home,
        ),
        row("dense", 0.91, p=0.3, settings={"recovery": budget}, key=key_of("control"), **home),
        row("activation-sparsity", achieved=sparse, key=key_of("sparse"), **EMPTY, **home),
        compared("moefy", "moefy", 0.05, usual, random, p=0.001) | home,
        compared("moefy", "moefy", -0.01, usual, oracle, p=0.6) | home,
    ]


def trained(layers, phi, seed, value, *, p, metric="perplexity", ratio=1.0) -> dict:
    """Return a model trained from scratch: `value` on held-out text, a loss from 6 to 4 in 1000 tokens."""
    made = row("architecture", value, p=p, metric=metric, notebook="08_architecture_training")
    made["settings"] = {"layers": layers, "phi": phi, "scale": "pocket", "tokens": 1000}
    made["seed"] = seed
    validation = [[s, 6 - 0.2 * s, 7.0 * s, 100 * s] for s in range(1, 11)]
    made["achieved"] = {
        "layers": layers,
        "parameters": 100_000 + 16_000 * layers,
        "validation": validation,
        "curve": validation,
        "seconds": 70.0,
        "tokens": 1000,
        "tokens_per_s": 1000 / 70,
    }
    interval = {"value": value / 10, "low": value / 10 - 0.1, "high": value / 10 + 0.1}
    made["quality"]["secondary"] = {"bits_per_byte": interval, "rougeL": interval}
    made["latency"]["shapes"] = {
        "prefill_b1": SHAPE,
        "decode_b1": SHAPE | {"ratio": ratio, "ratio_low": ratio - 0.02, "ratio_high": ratio + 0.02},
    }
    made["verdict"]["latency"] = {"prefill_b1": "no measurable change", "decode_b1": "no measurable change"}
    return made | {"key": key_of(layers, phi, seed, metric)}


def architecture_rows() -> list[dict]:
    """Return five layers with φ: better than without over three seeds, no different from six or linear."""
    home, values = (
        {"notebook": "08_architecture_training"},
        {
            (5, "none"): (100.0, 101.0, 99.0),
            (5, "shared"): (90.0, 91.5, 88.5),
            (6, "none"): (90.0, 89.0, 91.0),
            (5, "linear"): (91.0, 90.0, 89.0),
        },
    )
    counts = {"none": {"5": 128_789_504, "6": 1}, "shared": {"5": 128_872_064, "6": 3}}
    ratios = {(5, "none"): 1.0, (5, "shared"): 1.1, (6, "none"): 1.2, (5, "linear"): 1.05}
    steps = [{"layers": one[0], "phi": one[1], **SHAPE, "ratio": ratio} for one, ratio in ratios.items()]
    named = [{"layers": 5, "phi": phi, "scale": "pocket"} for phi in ("shared", "none")]
    return [
        row(value=100.0, metric="perplexity", **home),
        *(
            trained(*shape, seed, value, p=0.01, ratio=ratios[shape])
            for shape, several in values.items()
            for seed, value in enumerate(several)
        ),
        trained(5, "none", 0, 3.0, p=0.5, metric="bleu"),
        compared("architecture", "architecture", -10, *named, p=0.001, metric="perplexity") | home,
        row("training-speed", achieved={"shapes": steps}, **EMPTY, **home)
        | {"settings": {"scale": "pocket"}},
        row("parameter-counts", achieved={"counts": counts}, **EMPTY, **home),
    ]


def sheared_run(way, seed, curve, *, p=0.01, value=80.0, **asked) -> dict:
    """A model brought to a shape; `curve` is `[tokens, held-out loss]`."""
    made = row(way, value, p=p, metric="perplexity", notebook="09_sheared_llama", latency=None)
    made["settings"] = {"layers": 3, "heads": 4, "hidden": 192, "ffn": 352} | asked
    made["seed"] = seed
    made["achieved"] = {
        "layers": 3,
        "parameters": 450_000,
        "shape": {"layers": 3, "heads": 4, "hidden": 192, "ffn": 352},
        "pruning_tokens": curve[0][0],
        "tokens": curve[-1][0],
        "curve": curve,
        "seconds": 10.0,
        "tokens_per_s": 900.0,
        "source_loss": 3.5,
    }
    return made | {"key": key_of(way, seed, asked)}


def sheared_rows(seeds=(0, 1, 2)) -> list[dict]:
    """Return sheared ahead of scratch throughout; by magnitude at first, behind from 650 tokens on."""
    home = {"notebook": "09_sheared_llama"}
    made = [row(value=40.0, metric="perplexity", **home)]
    for seed in seeds:
        off = seed / 100
        made += [
            sheared_run("sheared", seed, [[200, 6.0], [600, 5.0 + off], [1000, 4.5 - off]]),
            sheared_run("lora-prune", seed, [[200, 6.0], [600, 5.1 + off], [1000, 4.6]]),
            sheared_run("lora-prune", seed, [[200, 6.0], [600, 5.5], [1000, 5.0 + off]], adapters="qlora"),
            sheared_run("magnitude-shape", seed, [[0, 9.0], [500, 5.7], [1000, 5.4 + off]]),
            sheared_run("scratch-shape", seed, [[0, 10.0], [500, 6.0], [1000, 5.0]]),
        ]
        for name, speed, loss in (("baseline", 1000.0, 5.0), ("QLoRA", 500.0 + seed, 5.0 + (seed - 1) / 10)):
            found = {
                "tokens_per_s": speed,
                "step_ms": 1.0,
                "peak_bytes": 2_000_000,
                "peak_kind": "rss",
                "loss": loss + off,
                "tokens": 4096,
            }
            asked = {"switch": name, "seed": seed}
            made.append(row("switch", settings=asked, achieved=found, key=key_of(asked), **EMPTY, **home))
    gap = {"value": 30.0, "low": 25.0, "high": 35.0, "p": 0.001, "test": "bootstrap", "n": 20}
    entries = [
        {
            "window": window,
            "kind": kind,
            "stretch": stretch,
            "value": value,
            "low": value - 1,
            "high": value + 1,
            "difference": difference,
        }
        for window, kind, stretch, value, difference in (
            (256, "none", 1, 40.0, None),
            (512, "none", 1, 70.0, None),
            (512, "yarn", 2, 41.0, gap | {"value": -29.0}),
            (256, "yarn", 2, 40.5, gap | {"value": 0.5, "low": -1.0, "high": 2.0, "p": 0.4}),
        )
    ]
    long = row("context-lengths", settings={"trained": 256}, achieved={"contexts": entries}, **EMPTY, **home)
    counts = row("shape-counts", achieved={"parameters": 1_345_423_360}, **EMPTY, **home)
    return [*made, long | {"key": key_of("long")}, counts | {"key": key_of("counts")}]
