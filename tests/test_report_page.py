"""The page holds what the rows give, decides as Python does, and works in a browser offline."""

import csv
import html
import io
import json
import random
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from functools import cache

import pytest

from helpers.report import build, check, page
from lmcompress.errors import BadSetting
from lmcompress.results import store
from lmcompress.results.rows import by_model_task
from lmcompress.study import decision
from lmcompress.study.decision import Budget, Option
from tests.synthetic_rows import SHAPE, key_of, pruning_rows, row

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
NODE = shutil.which("node")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page is not opened")
with_node = pytest.mark.skipif(NODE is None, reason="no node on PATH: the page's script is not run")
DECODER = "some/</script>decoder"


def study_rows() -> list[dict]:
    """Return two models: the pruned encoder with one faster configuration, and a decoder in perplexity."""
    pruned = pruning_rows()
    for pruned_row in pruned:
        if pruned_row["technique"] == "wanda":
            pruned_row["memory"]["file_bytes"] = 1_000_000
        elif pruned_row["settings"].get("recovery"):
            pruned_row["memory"]["file_bytes"] = 500_000
    fast = row("cast", 0.899, p=0.8, settings={"dtype": "bfloat16"}, key=key_of("fast"))
    shape = SHAPE | {"ratio": 0.5, "ratio_low": 0.45, "ratio_high": 0.55}
    fast["latency"] = fast["latency"] | {"shapes": {"batch1": shape}}
    fast["verdict"] = fast["verdict"] | {"latency": {"batch1": "faster"}}
    fast["memory"]["file_bytes"] = 2_000_000
    fast["quality"]["difference"] |= {"low": -0.004, "high": 0.002}
    place = {"model": DECODER, "task": "text", "metric": "perplexity"}
    worse = [row("wanda", 20 + s, sparsity=s, p=0.5 - s / 2, **place) for s in (0.1, 0.5, 0.9)]
    for worse_row in worse:
        worse_row["quality"]["difference"] |= {
            "value": worse_row["settings"]["sparsity"],
            "low": 0.0,
            "high": 1.0,
        }
        worse_row["latency"] = None
    return [*pruned, fast, row(value=20.0, **place), *worse]


def made_up() -> list[Option]:
    """Return options that no row gave yet: selection sets, missing sizes, ties, other times."""
    draw = random.Random(0)
    dense = Option("dense", "Dense", True, 100, 0.0, 0.0, 0.0, "points", 0.0, 0.0, "baseline", False, True)
    options = [replace(dense, ms={"b1": 10.0, "b8": 50.0}, ratio={"b1": 1.0, "b8": 1.0}, peak=1000)]
    for place in range(60):
        bound, shapes = (
            draw.choice([None, 0.0, 0.01, 0.03, 0.05, 0.2]),
            draw.sample(["b1", "b8"], draw.randint(0, 2)),
        )
        options.append(
            replace(
                dense,
                key=f"key{draw.randint(0, 999)}-{place}",
                baseline=False,
                bytes=draw.choice([None, 0, 10, 25, 50, 100]),
                loss=draw.choice([-1.0, 0.0, 0.125, 2.0]),
                bound=bound,
                selection_bound=draw.choice([None, None, 0.0, 0.02, 0.1]),
                verdict=draw.choice(["n.s.", "worse", "collapsed"]),
                listed=draw.random() < 0.5,
                ms={shape: draw.choice([5.0, 9.0, 20.0]) for shape in shapes},
                peak=draw.choice([None, 500, 900]),
            )
        )
    return options


def budgets(options: list[Option]) -> list[Budget]:
    """Return limits on and around what the options cost and lose, alone and together."""
    sizes = [None, *sorted({o.bytes for o in options if o.bytes is not None})[:8], 1000]
    margins = [None, 0.0, *decision.MARGINS, *sorted({o.chosen_by for o in options if o.chosen_by})[:4]]
    asked = [Budget(size, None, None, margin) for size in sizes for margin in margins]
    for shape in [None, "unheard of", *sorted(options[0].ms)]:
        times = [None, *sorted({o.ms[shape] for o in options if shape in o.ms})[:6], 0.0, 1.0]
        asked += [Budget(size, ms, shape, m) for size in sizes[:6] for ms in times for m in margins[:4]]
    peaks = [0, *sorted({o.peak for o in options if o.peak})[:6]]
    asked += [Budget(s, None, None, m, max_peak=p) for s in sizes[:4] for p in peaks for m in margins[:4]]
    return asked + [replace(budget, listed=True) for budget in asked]


def told(options: list[Option], budget: Budget) -> list:
    """Return a decision by its keys, or the message of its error."""
    try:
        decided = decision.decide(options, budget)
    except BadSetting as error:
        return [str(error)]
    near = (decided.chosen, decided.least_loss, decided.least_cost)
    return ["", *(option and option.key for option in near), [option.key for option in decided.fitting]]


def opened(tmp_path, text: str, script: str, *, width: int = 1000, address: str = "") -> object:
    """Return what `script`, run in the page in a frame of `width` px, hands to `say`."""
    probe = """<script>addEventListener("load", () => setTimeout(() => {
      const at = id => document.getElementById(id), all = query => [...document.querySelectorAll(query)];
      const say = told => parent.postMessage(JSON.stringify(told), "*");
      const use = () => at("headline").textContent, open = () => at("detail").firstChild.textContent;
      const set = (id, to) => { if (at(id).type === "checkbox") at(id).checked = to; else at(id).value = to;
        at(id).dispatchEvent(new Event("input")); at(id).dispatchEvent(new Event("change")); };
      const technique = title => all("#keys button").find(b => b.textContent === title);
      try { %s } catch (error) { say(String(error.stack)); } }, 50));</script></body>"""
    (tmp_path / "report.html").write_text(text.replace("</body>", probe % script), encoding="utf-8")
    style, source = f"width:{width}px;height:900px;border:0", f"report.html{html.escape(address)}"
    outer = f"""<body><iframe src="{source}" style="{style}"></iframe><script>
      addEventListener("message", event => {{ const box = document.createElement("pre");
      box.id = "said"; box.textContent = event.data; document.body.append(box); }});</script></body>"""
    (tmp_path / "outer.html").write_text(outer, encoding="utf-8")
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=4000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1300,900",
        "--dump-dom",
        (tmp_path / "outer.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    said = re.search(r'<pre id="said">(.*?)</pre>', dom, re.S)
    assert said, f"the page's script did not finish:\n{dom[-2000:]}"
    return json.loads(html.unescape(said.group(1)))


def in_node(text: str, expression: str, given: object) -> object:
    """Return what `expression` gives to the page's own functions, with `given` as `input`."""
    script = text[text.index('"use strict";') : text.index("// The page.")]
    program = f"""const fs = require("fs"), [input, embedded] = JSON.parse(fs.readFileSync(0, "utf8"));
      const document = {{ getElementById: () => ({{ textContent: embedded }}) }};
      const answer = (() => {{ {script} return eval({json.dumps(expression)}); }})();
      console.log(JSON.stringify(answer));"""
    stdin = json.dumps([given, embedded(text, parsed=False)])
    run = subprocess.run([NODE, "-e", program], input=stdin, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def embedded(text: str, *, parsed: bool = True) -> dict | str:
    """Return the data of a page."""
    written = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1)
    return json.loads(written) if parsed else written


@cache
def rendered(source) -> str:
    """Return the page of the rows that `source` gives."""
    return page.render(source())


def options_by_subject(rows: list[dict]) -> list[list[Option]]:
    """Return the options in the page's order of models and tasks."""
    return [decision.options(group) for group in by_model_task(decision.comparable_rows(rows)).values()]


def test_the_page_embeds_only_what_it_shows_and_asks_for_nothing_from_outside():
    text = page.render(study_rows())
    assert text == page.render(study_rows()) and len(text.encode()) < 100_000
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//|@import|fetch\(|XMLHttp""", text)
    subjects = embedded(text)["subjects"]
    assert [(s["model"], s["lower_is_better"]) for s in subjects] == [
        ("some/encoder", False),
        (DECODER, True),
    ]
    for subject, options in zip(subjects, options_by_subject(study_rows()), strict=True):
        names = asdict(options[0])
        assert [{name: o[name] for name in names} for o in subject["options"]] == [asdict(o) for o in options]
        assert [o["change"] for o in subject["options"]] == [decision.loss_text(o) for o in options]


def test_the_marks_are_those_of_the_figures():
    text = page.render(study_rows())
    colour, path, filled = embedded(text)["looks"]["Wanda"]
    assert colour == "#009E73" and filled and path == "M0.0,-6.0L-6.0,6.0L6.0,6.0Z"  # "^"
    assert page._outline("x")[1] is False


def test_without_rows_to_choose_from_there_is_still_a_page():
    assert '"subjects":[]' in page.render([row()])


def test_a_stale_or_missing_page_fails_the_check(tmp_path):
    rows = pruning_rows()
    places = {"report": tmp_path / "report.md", "images": tmp_path / "images"}
    build.build(rows, notebooks="notebooks", **places)

    def problems() -> list[str]:
        return [problem for problem in check.check(rows=rows, **places) if page.NAME in problem]

    file = tmp_path / page.NAME
    assert problems() == []
    file.write_text(file.read_text().replace("89.9 %", "98.9 %", 1))
    assert len(problems()) == 1
    file.unlink()
    assert problems() == ["report.html: is missing"]


@with_node
@pytest.mark.parametrize("source", [study_rows, store.published_rows])
def test_the_page_decides_and_words_as_python_does_on_the_same_rows(source):
    asked, wanted = [], []
    for options in options_by_subject(source()):
        grid = budgets(options)
        asked.append([asdict(budget) for budget in grid])
        standings = [[decision.standing(o, m) for o in options] for m in (None, 0.0, 0.01, 0.3)]
        wanted.append(
            [[told(options, budget) for budget in grid], standings, list(map(decision.loss_text, options))]
        )
    answers = in_node(
        rendered(source),
        """const key = o => o && o.key, told = d => d.error ? [d.error]
            : ["", key(d.chosen), key(d.least_loss), key(d.least_cost), d.fitting.map(key)];
        data.subjects.map((s, i) => [input[i].map(b => told(decide(s.options, b))),
          [null, 0, .01, .3].map(m => s.options.map(o => standing(o, m))), s.options.map(o => o.change)])""",
        asked,
    )
    assert sum(len(decisions) for decisions, *_ in wanted) > 500 and answers == wanted
    assert {len(answer) for answer in wanted[0][0]} == {1, 5}  # errors too
    assert {answer[1] is None for answer in wanted[0][0] if len(answer) > 1} == {True, False}


@with_node
def test_the_page_decides_as_python_does_on_options_that_no_row_gave_yet():
    options = made_up()
    grid = budgets(options)
    answers = in_node(
        rendered(study_rows),
        """const key = o => o && o.key;
        input[1].map(b => decide(input[0], b)).map(d => d.error ? [d.error]
          : ["", key(d.chosen), key(d.least_loss), key(d.least_cost), d.fitting.map(key)])""",
        [[asdict(option) for option in options], [asdict(budget) for budget in grid]],
    )
    assert answers == [told(options, budget) for budget in grid]
    assert len({json.dumps(answer) for answer in answers}) > 50


@with_node
def test_the_rows_shown_as_csv_and_the_front():
    text, front = in_node(
        rendered(study_rows),
        """const filters = { hidden: new Set(["Random"]), trained: "no", timed: true };
        const s = data.subjects[0], shown = eligible(s.options, filters);
        [csv(s, shown), front(s.options, o => o.bytes).map(o => o.name)]""",
        None,
    )
    lines = list(csv.DictReader(io.StringIO(text)))
    options = [
        o for o in options_by_subject(study_rows())[0] if not o.trained and not o.name.startswith("Random")
    ]
    assert [line["name"] for line in lines] == [option.name for option in options]  # names hold commas
    assert [float(line["loss"]) for line in lines] == [option.loss for option in options]
    assert {line["model"] for line in lines} == {"some/encoder"} and lines[0]["ms.batch1"] == "10"
    assert front == ["Magnitude, per layer, 90 % + recovery (30 steps)", "Dense"]


@in_browser
def test_the_decision_follows_limits_margins_and_filters(tmp_path):
    script = """const out = { first: use(), answer: at("answer").textContent, open: at("detail").textContent,
        current: all("tr[aria-current] td")[0].textContent, rings: all("#chosen, #open").length };
      set("mb", "0.0001"); out.nothing = use() + at("answer").textContent;
      set("mb", "-1"); out.negative = use(); out.unanswered = at("answer").textContent; set("mb", "");
      set("margin", "0.05"); out.loose = use();
      technique("Wanda").click(); out.hidden = use(); technique("Wanda").click(); out.back = use();
      set("listed", false); out.every = use();
      set("trained", "no"); out.untrained = use(); set("trained", "");
      set("margin", ""); out.least = use();
      set("margin", "share"); set("loss", "2"); out.share = use();
      set("margin", "amount"); set("loss", "1.7"); out.amount = use(); set("margin", ""); out.free = use();
      set("margin", "0.01"); set("shape", "batch1"); out.fast = use(); out.axis = at("axis").value;
      set("ms", "6"); out.within = use(); set("shape", ""); out.ms = at("ms").value;
      set("only", "fits"); out.fits = all("#table tbody tr").length; set("only", "all");
      out.rows = all("#table tbody tr").length; out.margins = all(".margin").length;
      out.front = [all("#front li").length, all("svg .front").length];
      at("none").click(); out.none = use(); set("shape", "batch1"); out.untimed = use(); say(out);"""
    out = opened(tmp_path, rendered(study_rows), script)
    assert out["first"].startswith("Use BF16") and out["current"] == "BF16" and out["rings"] == 2
    for shown in (out["answer"], out["open"]):
        for words in (
            "2.0 MB (50\u00a0% of dense)",
            "−0.10 pp [−0.40, +0.20]",
            "accuracy 89.9 % [87.9, 91.9]",
            "5.5 ms (0.55 of dense)",
            "selected and reported on the same examples",
            "a cpu",
            f"python -m lmcompress.study.apply {key_of('fast')} --save FOLDER",
        ):
            assert words in shown
    assert (
        out["nothing"].startswith("Nothing measured fits") and "Least cost within the loss" in out["nothing"]
    )
    assert (
        out["negative"] == "File, at most MB: give a number that is not negative." and not out["unanswered"]
    )
    assert out["loose"] == out["back"] and out["loose"].startswith("Use Wanda, 50 %")
    assert out["hidden"].startswith("Use BF16")
    assert out["every"].startswith("Use Magnitude, per layer, 90 % + recovery (30 steps)")
    assert out["untrained"].startswith("Use Wanda, 50 %")
    assert out["least"] == out["free"] and out["least"].startswith("Use the dense model")
    assert out["share"].startswith("Use Magnitude, per layer, 90 % + recovery")  # bound 1.98 %
    assert out["amount"].startswith("Use BF16")  # 1.7 points are 1.89 % of 90 %
    assert out["fast"].startswith("Use BF16") and "fastest" in out["fast"] and out["axis"] == "batch1"
    assert out["within"].startswith("Use BF16") and out["ms"] == ""
    assert 0 < out["fits"] < out["rows"] == 9 and out["margins"] == 2
    assert out["front"][0] == out["front"][1] >= 2 and out["none"].startswith("Nothing measured fits")
    assert out["untimed"] == "no time measured at 'batch1'; available: none"


@in_browser
def test_of_the_last_model_nothing_stays_but_a_margin_that_is_a_share(tmp_path):
    script = """const ids = "mb ram shape ms loss trained runtime only axis margin".split(" ");
      const state = () => ids.map(id => at(id).value);
      set("listed", false); set("mb", "3"); set("shape", "batch1"); set("ms", "7"); set("trained", "no");
      set("timed", true); set("only", "fits"); set("margin", "0.05");
      technique("Wanda").click(); all("#table button")[0].click();
      const out = { row: location.hash.includes("row=") }; set("subject", "1");
      out.state = state(); out.checks = [at("listed").checked, at("timed").checked];
      out.pressed = all("#keys button[aria-pressed=false]").length; out.use = use(); out.hash = location.hash;
      out.open = open(); out.ticks = at("chart").textContent;
      set("margin", "amount"); set("loss", "0.9"); set("subject", "0"); out.amount = state(); say(out);"""
    out = opened(tmp_path, rendered(study_rows), script)
    assert out["row"] and out["state"] == ["", "", "", "", "", "", "", "all", "bytes", "0.05"]
    assert out["checks"] == [True, False] and out["pressed"] == 0
    assert out["use"].startswith("Use ") and out["use"][4:].startswith(
        out["open"].replace("Dense", "the dense")
    )
    assert "row=" not in out["hash"] and "hide=" not in out["hash"] and "+3 %" in out["ticks"]
    assert out["amount"][-1] == "0.01" and out["amount"][4] == ""


@in_browser
def test_the_address_restores_the_answer_and_keys_reach_every_row(tmp_path):
    script = """set("margin", "0.05"); set("listed", false); set("mb", "3.5"); technique("Wanda").click();
      all("#table button")[1].focus(); document.activeElement.click();
      const out = { hash: location.hash, use: use(), open: open() };
      out.focus = document.activeElement.textContent;
      at("chart").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" })); out.next = open();
      const dot = all(".mark path").at(-1).getBoundingClientRect();
      const where = { clientX: dot.x + dot.width / 2, clientY: dot.y + dot.height / 2 };
      at("chart").dispatchEvent(new MouseEvent("click", where)); out.clicked = open();
      out.reach = all("#chart, .scroll").every(e => e.tabIndex === 0); say(out);"""
    out = opened(tmp_path, rendered(study_rows), script)
    assert out["open"] == out["focus"] != out["next"] and out["reach"] and out["clicked"] == "Dense"
    state = """{ hash: location.hash, use: use(), open: open(), mb: at("mb").value,
      listed: at("listed").checked,
      hidden: all("#keys button[aria-pressed=false]").map(b => b.textContent) }"""
    linked = {name: out[name] for name in ("hash", "use", "open")}
    linked |= {"mb": "3.5", "listed": False, "hidden": ["Wanda"]}
    assert opened(tmp_path, rendered(study_rows), f"say({state})", address=out["hash"]) == linked
    later = f"""addEventListener("hashchange", () => say({state})); location.hash = {out["hash"]!r};"""
    assert opened(tmp_path, rendered(study_rows), later) == linked
    wrong = "#model=nobody&mb=1&margin=7&shape=b9"
    answer = opened(tmp_path, rendered(study_rows), f"say({state})", address=wrong)
    assert answer["use"].startswith("Use BF16") and answer["mb"] == "" and answer["listed"]


@in_browser
@pytest.mark.parametrize("source", [study_rows, store.published_rows])
def test_on_a_phone_nothing_overflows_and_no_word_breaks_and_every_control_has_a_name(tmp_path, source):
    script = """const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), broken = [];
      while (walk.nextNode()) { const text = walk.currentNode, parent = text.parentElement;
        if (parent.closest("script, style, select, svg, code, noscript")) continue;
        for (const match of text.data.matchAll(/[\\p{L}\\p{N}]+/gu)) { const range = document.createRange();
          range.setStart(text, match.index); range.setEnd(text, match.index + match[0].length);
          if (new Set([...range.getClientRects()].map(r => r.top)).size > 1) broken.push(match[0]); } }
      const controls = all("input, select"), beyond = e => e.getBoundingClientRect().right > innerWidth + 1;
      const wide = all("body *").filter(e => !e.closest(".scroll, svg") && beyond(e)).map(e => e.outerHTML);
      say({ window: innerWidth, scroll: document.documentElement.scrollWidth, broken, wide,
        names: controls.map(e => e.labels[0].textContent), nested: all("label input, label select").length,
        buttons: all("button").every(b => b.textContent.trim()), live: all("[role=status]").length,
        lang: document.documentElement.lang, marks: all(".mark").length });"""
    out = opened(tmp_path, rendered(source), script, width=390)
    assert out["window"] == 390 and out["scroll"] <= 390 and out["broken"] == [] and out["wide"] == []
    assert out["nested"] == 0 and out["buttons"] and out["live"] and out["lang"] == "en" and out["marks"] > 3
    assert len(set(out["names"])) == len(out["names"]) and not re.search(r"\d", " ".join(out["names"]))
