"""The run page: what stands in it, that nothing in it runs, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from ingest.errors import ConfigError
from ingest.quarantine import QuarantineBook, QuarantineEntry
from ingest.stores import open_store
from train.__main__ import main
from train.config import Recipe
from train.page import page_of, write_page
from train.pictures import PredictedCase
from train.records import Event, StepRecord, write_events, write_steps
from train.slices import MOST_PIXELS, MOST_SLICES, grey_png, label_png, load_slices, save_slices, slices_of
from train.waits import CAUSES

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">${x}{{7*7}}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def case(case_id: str, shape: tuple[int, int, int] = (16, 40, 48)) -> PredictedCase:
    """A sphere (1) with a smaller one (2) in it, predicted a little off."""
    axes = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    truth = (radius < 0.8).astype(np.uint8) + (radius < 0.4)
    image = truth + np.random.default_rng(0).normal(0, 0.2, shape)
    return PredictedCase(case_id, image.astype(np.float32), truth, np.roll(truth, 2, axis=2))


def row(epoch: int, **changes) -> dict:
    causes = dict.fromkeys(CAUSES, 0.0) | {"starting": 1.2, "fetching": 0.5 + 0.1 * epoch, "transforming": 0.3}
    return {
        "epoch": epoch,
        "step": 30 * (epoch + 1),
        "train_loss": 0.7 * 0.8**epoch,
        "learning_rate": 0.003,
        "samples_per_s": 26.0 + epoch % 2,
        "stall_share": 0.05,
        "stall_s": 2.0,
        "stall_by_cause_s": causes,
        "wall_s": 40.0,
        "first_batch_s": 1.25,
        "au": 0.97,
        "mean_dice": 0.9 - 0.4 * 0.6**epoch,
        "dice_by_class": [0.91 - 0.4 * 0.6**epoch, 0.89 - 0.4 * 0.6**epoch],
        "quarantined": 1,
    } | changes


def whole_run(run_dir: Path, epochs: int = 8) -> str:
    """A run with two starts, a fault, retries, a bad case and names that mean harm."""
    store = open_store(str(run_dir))
    store.put("recipe.json", Recipe(run_dir=HOSTILE).to_json().encode())
    store.put("metrics.json", json.dumps([row(epoch) for epoch in range(epochs)]).encode())
    rng = np.random.default_rng(1)
    for epoch in range(epochs):
        start = "00001-a" if epoch < 3 else "00002-b"
        records = [
            StepRecord(
                epoch=epoch,
                step=step,
                ended_unix_s=1.8e9 + 45 * epoch + 1.3 * (step - 30 * epoch) + 60 * (epoch >= 3),
                wait_s=3.0 if step % 30 == 1 else float(rng.exponential(0.03)),
                compute_s=1.2 + float(rng.normal(0, 0.02)),
                loss=0.7 * 0.993**step + float(rng.normal(0, 0.02)),
                learning_rate=0.003,
                samples=4,
            )
            for step in range(30 * epoch + 1, 30 * epoch + 31)
        ]
        write_steps(store, start, records)
    at = 1.8e9
    write_events(
        store,
        [
            Event(at - 5, "start", "2 ranks begin epoch 1 at step 0"),
            Event(at + 70, "retry", "3 status-503, 1 reset"),
            Event(at + 100, "quarantine", "1 cases in quarantine"),
            Event(at + 150, "fault", f"rank 1: {HOSTILE}"),
            Event(at + 190, "start", "2 ranks begin epoch 4 at step 90, from checkpoint_3"),
            Event(at + 430, "end", "the run is done"),
        ],
    )
    book = QuarantineBook(str(run_dir), 5)
    book.report(QuarantineEntry(3, HOSTILE, f"gs://bucket/{HOSTILE}_x.npy", "not-npy", f"expected {HOSTILE}", 0))
    save_slices(store, [case(HOSTILE), case("case_00002", (12, 64, 40))])
    return str(run_dir)


def test_a_name_that_means_harm_stands_in_the_page_as_text_only(tmp_path):
    html = page_of(whole_run(tmp_path))
    assert "<script>document.title" not in html
    assert "<img src=x" not in html
    assert 'onerror="document' not in html
    assert "&lt;/script&gt;&lt;script&gt;document.title" in html
    assert "{{7*7}}" in html  # as it was: no template is made of data
    assert html.count("plotly.js v") == 1  # the library is there once
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html.replace(get_plotlyjs(), ""))


def test_the_page_says_what_became_of_the_run_and_why_it_waited(tmp_path):
    html = page_of(whole_run(tmp_path))
    for text in ("8 of 100", "0.8888", "done", "Waited for data", "fetching 36%", "not-npy", "checkpoint_3"):
        assert text in html, text
    for name in ("loss", "dice", "rate", "speed", "au", "stall", "timeline"):
        assert f'id="plot-{name}"' in html, name
    assert "trainer.batch_size" in html
    assert "leaves out its first step with the wait for that step&#39;s batch, here 1.2 s of 40.0 s;" in html


def test_a_run_that_failed_in_its_first_epoch_has_a_page(tmp_path):
    store = open_store(str(tmp_path))
    store.put("recipe.json", Recipe().to_json().encode())
    write_events(store, [Event(1.8e9, "start", "1 ranks begin epoch 1 at step 0"), Event(1.8e9, "fault", "no luck")])
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    for text in ("No epoch was finished", "0 of 100", "failed", "no luck", "not scored", "None.", "not known"):
        assert text in html, text


def test_a_run_without_scores_or_times_or_with_fields_of_old_has_a_page(tmp_path):
    store = open_store(str(tmp_path))
    store.put("recipe.json", b'{"trainer": {"epochs": 2}, "of": {"another": "version"}}')
    old = {"epoch": 0, "step": 3, "train_loss": 0.5, "mean_dice": None, "samples_per_s": 2.0, "au": None}
    store.put("metrics.json", json.dumps([old, {"epoch": 1, "train_loss": float("nan")}]).encode())
    html = page_of(str(tmp_path))
    assert "No epoch was scored" in html
    assert "AU and stall are those" not in html  # AU is not known
    assert 'id="plot-dice"' not in html
    assert "of.another" in html


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"found no recipe\.json"):
        write_page(str(tmp_path))
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_a_large_case_is_thinned_and_its_slices_come_back_as_they_were(tmp_path):
    large = case("large", (100, 300, 400))
    save_slices(open_store(str(tmp_path)), [large])
    (back,) = load_slices(str(tmp_path))
    assert back.case_id == "large"
    assert len(back.depths) == MOST_SLICES
    assert (back.depths[0], back.depths[-1], back.of_depths) == (0, 99, 100)
    assert max(back.image.shape[1:]) <= MOST_PIXELS
    assert np.array_equal(back.truth, slices_of(large).truth)
    assert np.array_equal(back.truth[0], large.truth[0, ::2, ::2])


def test_pictures_are_pngs_with_a_clear_background(tmp_path):
    label = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    picture = Image.open(io.BytesIO(base64.b64decode(label_png(label)))).convert("RGBA")
    pixels = np.asarray(picture)
    assert pixels[0, 0, 3] == 0
    assert tuple(pixels[0, 1]) == (0xE6, 0x9F, 0x00, 128)
    assert tuple(pixels[1, 0]) == (0x56, 0xB4, 0xE9, 128)
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(grey_png(label * 100)))))
    assert np.array_equal(grey, label * 100)


PROBE = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const place = document.querySelector(".case");
  const slider = place.querySelector("input"), images = [...place.querySelectorAll("img")];
  const before = images.map((image) => image.src), said = place.querySelector("output").textContent;
  slider.value = 2;
  slider.dispatchEvent(new Event("input"));
  const all = [...document.querySelectorAll(".case img")];
  Promise.all(all.map((image) => image.decode())).then(() => {
    const found = document.createElement("pre");
    found.id = "found";
    found.textContent = JSON.stringify({
      moved: images.map((image, number) => image.src !== before[number]),
      said: [said, place.querySelector("output").textContent],
      sizes: images.map((image) => [image.naturalWidth, image.naturalHeight]),
      drawn: [...document.querySelectorAll(".js-plotly-plot")].map((plot) => [
        plot.id, plot.querySelectorAll(".trace, .points").length
      ]),
      wide: document.documentElement.scrollWidth > window.innerWidth,
      title: document.title,
    });
    document.body.append(found);
  });
}, 1500));
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_in_chromium_the_page_draws_and_scrolls_without_a_word_in_the_console(tmp_path):
    run_dir = tmp_path / "run"
    page = Path(write_page(whole_run(run_dir)))
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text("utf-8").replace("</body>", PROBE + "</body>"), "utf-8")
    browser = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1280,900",
    ]
    browser += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=30000", "--dump-dom", probed.as_uri()]
    for _ in range(6):  # on a busy machine it may dump the page before the images are there
        done = subprocess.run(browser, capture_output=True, text=True, timeout=240, check=True)
        assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
        shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
        if shown is not None:
            break
    assert shown is not None, done.stdout[-2000:]
    found = json.loads(shown[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert all(found["moved"])
    assert len(found["moved"]) == 5  # image; image and truth; image and prediction
    assert found["said"] == ["8 of 16", "3 of 16"]
    assert found["sizes"] == [[48, 40]] * 5
    assert {name for name, _ in found["drawn"]} == {
        f"plot-{name}" for name in ("loss", "dice", "rate", "speed", "au", "stall", "timeline")
    }
    assert all(traces > 0 for _, traces in found["drawn"])
    assert not found["wide"]
    assert found["title"] == "run - voxflux"
