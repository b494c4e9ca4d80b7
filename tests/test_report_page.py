"""The page holds what the rows give, decides as Python does, and works in a browser offline."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import asdict

import pytest

from helpers.report import build, check, page
from lmcompress.results import store
from lmcompress.results.rows import by_model_task
from lmcompress.study import decision, explain
from lmcompress.study.decision import Budget, Option
from tests.synthetic_rows import SHAPE, pruning_rows, row

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
NODE = shutil.which("node")
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page is not opened")


def study_rows() -> list[dict]:
    """Two models: the pruned encoder with one faster way, and a decoder in perplexity."""
    fast = row("cast", 0.899, p=0.8)
    shape = SHAPE | {"ratio": 0.5, "ratio_low": 0.45, "ratio_high": 0.55}
    fast["latency"] = fast["latency"] | {"shapes": {"batch1": shape}}
    fast["verdict"] = fast["verdict"] | {"latency": {"batch1": "faster"}}
    place = {"model": "some/</script>decoder", "task": "text", "metric": "perplexity"}
    worse = [row("wanda", 20 + s, sparsity=s, p=0.5 - s / 2, **place) for s in (0.1, 0.5, 0.9)]
    for one in worse:
        one["quality"]["difference"] |= {"value": one["settings"]["sparsity"], "low": 0.0, "high": 1.0}
    return [*pruning_rows(), fast, row(value=20.0, **place), *worse]


def budgets(options: list[Option]) -> list[Budget]:
    """Limits on and around what the options cost and lose, alone and together."""
    sizes = [None, *sorted({o.bytes for o in options})[:12], 1000]
    losses = [None, 0.0, 0.5, *sorted({round(o.loss_high, 6) for o in options})[:6]]
    shapes = sorted(options[0].ms)
    made = [Budget(s, None, None, loss, c) for s in sizes for loss in losses for c in ("worst", "estimate")]
    for shape in shapes:
        times = [None, *sorted({o.ms[shape] for o in options if shape in o.ms})[:8], 1.0]
        made += [Budget(s, ms, shape, loss) for s in sizes for ms in times for loss in losses[:4]]
    peaks = [0, *sorted({o.peak for o in options if o.peak})[:8]]
    made += [Budget(s, None, None, loss, max_peak=p) for s in sizes[:4] for p in peaks for loss in losses[:4]]
    return made


def told(found: decision.Decision) -> list:
    near = (found.chosen, found.least_loss, found.least_cost)
    return [one and one.key for one in near] + [len(found.fitting), len(found.tied)]


def opened(tmp_path, text: str, script: str, *, width: int = 1000) -> object:
    """What `script`, run in the page in a browser window of `width` px, hands to `say`."""
    probe = """<script>addEventListener("load", () => setTimeout(() => {
      const say = value => { const box = document.createElement("pre"); box.id = "said";
        box.textContent = JSON.stringify(value); document.body.append(box); };
      %s }, 50));</script></body>"""
    file = tmp_path / "report.html"
    file.write_text(text.replace("</body>", probe % script), encoding="utf-8")
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=4000",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--dump-dom",
        file.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    said = re.search(r'<pre id="said">(.*?)</pre>', dom, re.S)
    assert said, f"the page's script did not finish:\n{dom[-2000:]}"
    return json.loads(html.unescape(said.group(1)))


def in_node(text: str, expression: str, given: object) -> object:
    """Return what `expression` gives to the page's own functions, with `given` as `input`."""
    script = text[text.index('"use strict";') : text.index("window.study.lossText")]
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1)
    program = f"""const fs = require("fs"), window = {{}}, [input,
      embedded] = JSON.parse(fs.readFileSync(0, "utf8"));
      const document = {{ getElementById: () => ({{ textContent: embedded }}) }};
      const answer = (() => {{ {script.replace("// Words.", "")} return eval({json.dumps(expression)}); }})();
      console.log(JSON.stringify(answer));"""
    stdin = json.dumps([given, embedded])
    return json.loads(
        subprocess.run([NODE, "-e", program], input=stdin, capture_output=True, text=True, check=True).stdout
    )


def test_the_page_embeds_only_what_it_shows_and_asks_for_nothing_from_outside():
    text = page.render(study_rows())
    assert text == page.render(study_rows()) and len(text.encode()) < 100_000
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//|@import|fetch\(|XMLHttp""", text)
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1)
    found = json.loads(embedded)
    assert [(one["model"], one["kind"]) for one in found["subjects"]] == [
        ("some/encoder", "encoder"),
        ("some/</script>decoder", "encoder"),
    ]
    own = [r for r in decision.comparable_rows(study_rows()) if r["model"] == "some/encoder"]
    kept = [
        {name: one[name] for name in asdict(decision.options(own)[0])}
        for one in found["subjects"][0]["options"]
    ]
    assert kept == [asdict(one) for one in decision.options(own)]


def test_without_rows_to_choose_from_there_is_still_a_page():
    assert '"subjects":[]' in page.render([row()])


def test_a_stale_or_missing_page_fails_the_check(tmp_path):
    rows = pruning_rows()
    places = {"report": tmp_path / "report.md", "images": tmp_path / "images"}
    build.build(rows, notebooks="notebooks", **places)
    assert check.check(rows=rows, **places) == []
    file = tmp_path / page.NAME
    file.write_text(file.read_text().replace("89.9 %", "98.9 %", 1))
    assert any("report.html" in one for one in check.check(rows=rows, **places))
    file.unlink()
    assert any("report.html is missing" in one for one in check.check(rows=rows, **places))


@pytest.mark.skipif(NODE is None, reason="no node on PATH: the page's script is not run")
@pytest.mark.parametrize("source", [study_rows, store.published_rows])
def test_the_page_decides_and_words_as_python_does_on_the_same_rows(source):
    recorded, asked, wanted = source(), [], []
    for rows in by_model_task(decision.comparable_rows(recorded)).values():
        options = decision.options(rows)
        asked.append([asdict(budget) for budget in budgets(options)])
        answers = [told(decision.decide(options, budget)) for budget in budgets(options)]
        wanted.append([answers, [explain.loss_text(option) for option in options]])
    found = in_node(
        page.render(recorded),
        """const key = o => o && o.key;
        data.subjects.map((s, i) => [input[i].map(b => { const f = decide(s.options, b);
          return [key(f.chosen), key(f.least_loss), key(f.least_cost), f.fitting.length, f.tied.length]; }),
          s.options.map(lossText)])""",
        asked,
    )
    assert sum(len(answers) for answers, _ in wanted) > 250 and found == wanted
    assert {chosen is None for chosen, *_ in wanted[0][0]} == {True, False}


@in_browser
def test_events_change_the_answer_and_the_chart(tmp_path):
    script = """const at = id => document.getElementById(id),
      count = () => document.querySelectorAll(".way").length;
      const set = (id, value, event) => { at(id).value = value; at(id).dispatchEvent(new Event(event)); };
      const out = { first: at("answer").textContent, all: count(), ring: !!at("chosen") };
      set("mb", "0.0001", "input"); out.none = at("answer").textContent;
      set("mbs", "0.9", "input"); out.slid = [at("mb").value, at("answer").textContent];
      set("mb", "", "input");
      set("shape", "batch1", "change"); out.fast = at("answer").textContent; out.axis = at("axis").value;
      set("only", "fits", "change"); out.fits = count(); set("only", "all", "change");
      [...document.querySelectorAll("#keys button")]
      .find(b => b.textContent === "Magnitude, per layer").click(); out.hidden = count(); at("every").click();
      set("range", "all", "change"); out.wide = count();
      out.table = document.querySelectorAll("#table tbody tr").length;
      const box = at("chart").getBoundingClientRect(),
      dot = document.querySelector(".way:last-of-type").getBoundingClientRect();
      at("chart").dispatchEvent(new PointerEvent("click", { clientX: dot.x + dot.width / 2,
      clientY: dot.y + dot.height / 2 }));
      out.tapped = at("detail").textContent;
      at("chart").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
      out.key = at("detail").textContent; set("subject", "1", "change");
      out.second = at("answer").textContent; say(out);"""
    out = opened(tmp_path, page.render(study_rows()), script)
    assert out["first"].startswith("Use: Magnitude, per layer, 90 % + recovery") and out["ring"]
    assert out["none"].startswith("Nothing measured fits") and "Least cost within the loss" in out["none"]
    assert float(out["slid"][0]) == pytest.approx(0.9, abs=0.1) and out["slid"][1].startswith("Use: ")
    assert (
        out["fast"].startswith("Use: Half precision")
        and "5.5 ms at batch 1" in out["fast"]
        and out["axis"] == "batch1"
    )
    assert 0 < out["fits"] < out["all"] < out["wide"] == out["table"] and out["hidden"] < out["all"]
    assert "accuracy" in out["tapped"] and out["key"] not in ("", out["tapped"])
    assert "of perplexity" in out["second"]


@in_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_scrolls_sideways_and_every_control_has_a_name(tmp_path, width):
    frame = f"""const inner = document.createElement("iframe");
      inner.style = "width:{width}px;height:800px;border:0";
      inner.srcdoc = document.documentElement.outerHTML.replace(/addEventListener\\("load"/,
      'false && addEventListener("load"');
      inner.onload = () => setTimeout(() => {{ const d = inner.contentDocument;
        const named = [...d.querySelectorAll("input, select")].every(e => e.closest("label") || e.ariaLabel);
        say({{ window: inner.contentWindow.innerWidth, scroll: d.documentElement.scrollWidth, named,
          lang: d.documentElement.lang, marks: d.querySelectorAll(".way").length,
          live: !!d.querySelector("[aria-live]") }}); }}, 100);
      document.body.append(inner);"""
    out = opened(tmp_path, page.render(study_rows()), frame, width=1400)
    assert out["window"] == width and out["scroll"] <= width
    assert out["named"] and out["live"] and out["lang"] == "en" and out["marks"] > 3
