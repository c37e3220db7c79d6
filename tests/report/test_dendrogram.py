import numpy as np
import pytest
from scipy.cluster import hierarchy

from jaxscape.report import style
from jaxscape.report.dendrogram import _prune, dendrogram


def tree(n_peaks, n_subjects=12):
    rng = np.random.default_rng(n_peaks)
    linkage = hierarchy.linkage(rng.normal(size=(n_peaks, 3))) if n_peaks > 1 else None
    return linkage, rng.integers(0, 50, (n_peaks, n_subjects)), [f"subject_{i}" for i in range(n_subjects)]


@pytest.mark.parametrize("n_peaks", [1, 2, 30])
def test_dendrogram_bars_and_labels_match_the_counts(n_peaks):
    linkage, counts, names = tree(n_peaks)
    fig = dendrogram(linkage, counts, names, "5shot, layer 3")
    branches, bars = fig.axes
    order = hierarchy.dendrogram(linkage, no_plot=True)["leaves"] if n_peaks > 1 else [0]
    labels = [text.get_text() for text in bars.texts][:n_peaks]
    for place, leaf in enumerate(order):
        size, major = counts[leaf].sum(), counts[leaf].argmax()
        assert labels[place] == f"subject {major} ({size}, {100 * counts[leaf].max() / size:.0f} %)"
        own = [
            p for p in bars.patches if abs(p.get_y() + p.get_height() / 2 - place) < 0.01 and p.get_width()
        ]
        shares = sorted(p.get_width() for p in own)
        assert sum(shares) == pytest.approx(1) and shares[-1] == pytest.approx(counts[leaf].max() / size)
    (lines,) = branches.collections
    assert len(lines.get_segments()) == 4 * (n_peaks - 1) + 1
    if n_peaks > 1:
        crossbars = [s[0, 0] for s in lines.get_segments() if s[0, 0] == s[1, 0]]
        assert set(crossbars) == set(linkage[:, 2])


def test_dendrogram_of_more_peaks_than_fit_keeps_the_largest():
    linkage, counts, names = tree(90, 57)
    fig = dendrogram(linkage, counts, names, "0shot", max_peaks=20)
    sizes = sorted(counts.sum(1))[-20:]
    labels = [text.get_text() for text in fig.axes[1].texts][:20]
    assert sorted(int(label.split("(")[1].split(",")[0]) for label in labels) == sizes
    assert "20 largest of 90" in fig.texts[0].get_text()


def test_pruning_keeps_the_heights_at_which_the_kept_peaks_meet():
    linkage, counts, _ = tree(25)
    kept = np.array([0, 3, 4, 11, 17, 24])
    pruned = _prune(linkage, 25, kept)
    whole = hierarchy.cophenet(linkage)
    square = np.zeros((25, 25))
    square[np.triu_indices(25, 1)] = whole
    np.testing.assert_allclose(hierarchy.cophenet(pruned), square[np.ix_(kept, kept)][np.triu_indices(6, 1)])
    assert hierarchy.is_valid_linkage(pruned) and pruned[-1, 3] == 6


def test_dendrogram_copes_with_no_saddle_and_with_an_empty_peak(tmp_path):
    linkage = np.array([[0, 1, 0.5, 2], [2, 3, np.inf, 3]])
    counts = np.array([[3, 0], [0, 0], [1, 4]])
    fig = dendrogram(linkage, counts, ["$a", "_b"], "t")
    assert "no points" in [text.get_text() for text in fig.axes[1].texts]
    style.save(fig, tmp_path, "t")


def test_dendrogram_refuses():
    linkage, counts, names = tree(5)
    with pytest.raises(ValueError, match=r"linkage must be \[4, 4\]"):
        dendrogram(linkage[:2], counts, names, "t")
    with pytest.raises(ValueError, match="composition must be"):
        dendrogram(linkage, counts, names[:3], "t")
    with pytest.raises(ValueError, match="negative"):
        dendrogram(linkage, -counts, names, "t")
    with pytest.raises(ValueError, match="composition must be"):
        dendrogram(None, np.zeros((0, 3)), ["a", "b", "c"], "t")
    linkage[-1, 0] = 40
    with pytest.raises(ValueError, match="linkage"):
        dendrogram(linkage, counts, names, "t")
