import subprocess
import sys

import numpy as np

from jaxscape.report import figures, style
from jaxscape.report.dendrogram import dendrogram


def layers():
    return figures.curve([{"condition": "$a", "layer": i, "n_peaks": i % 3} for i in range(9)], "n_peaks")


def bars():
    return dendrogram(np.array([[0, 1, 0.5, 2], [2, 3, 0.7, 3]]), np.eye(3), ["_a", "b", "c"], "$x")


def test_saved_figures_have_the_same_bytes_and_tell_no_date(tmp_path):
    for make in (layers, bars):
        fig = make()
        runs = [style.save(fig, tmp_path / "a", "f"), style.save(fig, tmp_path / "b", "f")]
        runs.append(style.save(make(), tmp_path / "c", "f"))
        first, *others = [[path.read_bytes() for path in run] for run in runs]
        assert all(other == first for other in others)
        png, svg = first
        assert png.startswith(b"\x89PNG") and b"Software" not in png and b"tEXt" not in png
        assert b"<dc:date>" not in svg and b"Matplotlib v" not in svg
        assert int.from_bytes(png[16:20], "big") == round(fig.get_size_inches()[0] * 150)


def test_subject_colors_are_distinct_and_stable():
    colors = style.subject_colors(57)
    assert len(set(colors)) == 57 and style.subject_colors(12) == colors[:12]
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colors])
    seen = style._perceived(rgb)[:, :3]
    distance = np.linalg.norm(seen[:, None] - seen, axis=-1)[np.triu_indices(57, 1)]
    assert distance.min() > 0.05  # some 2.5 just noticeable differences


def test_the_callers_matplotlib_is_left_alone():
    code = """
import matplotlib
matplotlib.rcParams["font.size"] = 31
params = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}
before = params()
from jaxscape.report import figures, style
fig = figures.curve([{"condition": "_a", "layer": 1, "n_peaks": 3}], "n_peaks")
import sys, tempfile
style.save(fig, tempfile.mkdtemp(), "f")
assert params() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tables_and_page_do_not_load_matplotlib():
    code = "import sys; from jaxscape.report import tables, page; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shades_go_from_a_tint_to_the_colour():
    assert style.shade("#009e73", 1.0) == "#009e73"
    assert style.shade("#000000", 0.5) == "#595959"  # 65 % of black
