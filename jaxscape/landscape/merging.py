"""The merging of peaks that noise alone could have made, one saddle after the other, from the highest down.

Letters in shapes: C peaks, S saddles.
"""

import heapq
from typing import NamedTuple

import numpy as np

from jaxscape.landscape.topography import Saddles


class Merged(NamedTuple):
    """What merging leaves, on the host.

    absorbed_by: [C] int64, the peak that each peak ended in; a peak that stands, itself.
    saddles: those left between peaks that stand, in the order of the pairs; every pair once.
    """

    absorbed_by: np.ndarray
    saddles: Saddles


def merge_peaks(peak, peak_error, saddles: Saddles, z: float) -> Merged:
    """Merge peaks until all saddles are significant: step 4 of `advanced_density_peaks`.

    The highest insignificant saddle goes first; of equal ones, the first pair of peaks. Of its two peaks, the one
    that rises less above it, in units of the errors, joins the other; if none does, the second joins the first. Of
    two saddles that come to join the same pair the higher stays; of equal ones, the one of the peak that stands.

    Every merge can make saddles significant or, where errors differ, insignificant, and those of the next merge may
    be among them: the order is sequential by nature. So this runs on the host, with a heap: log S steps for every
    saddle that is moved, and as many are moved as the peaks that go have; for the peaks of a million points,
    about as long as a sort of these. There are far fewer saddles than points.

    Args:
        peak: [C] log density at the peaks, in the order of their numbers.
        peak_error: [C] its standard error.
        saddles: the saddles between them, every pair at most once. The arithmetic is that of these arrays' floats.
        z: significance, in standard errors.
    """
    peak, peak_error = np.asarray(peak), np.asarray(peak_error)
    low, high, height, error = (np.asarray(a)[: int(saddles.count)] for a in saddles[:4])
    z = peak.dtype.type(z)
    with np.errstate(divide="ignore", invalid="ignore"):  # errors of zero
        weak = peak[low] - height < z * (peak_error[low] + error)
        weak |= peak[high] - height < z * (peak_error[high] + error)
        beyond: list[dict] = [{} for _ in peak]  # of each peak: the peak beyond a saddle -> the saddle
        for s, (one, two) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
            beyond[one][two] = beyond[two][one] = s
        # Of equal heights, the tuples put the first pair first.
        queue = list(zip(-height[weak], low[weak].tolist(), high[weak].tolist(), np.flatnonzero(weak), strict=True))
        absorbed_by = np.arange(len(peak))
        _merge(list(peak), list(peak_error), list(height), list(error), z, beyond, queue, absorbed_by)
    while np.any(absorbed_by[absorbed_by] != absorbed_by):
        absorbed_by = absorbed_by[absorbed_by]
    left = [(one, two, s) for one, others in enumerate(beyond) for two, s in others.items() if one < two]
    left = np.array(sorted(left), np.int64).reshape(-1, 3)
    return Merged(absorbed_by, Saddles(left[:, 0], left[:, 1], height[left[:, 2]], error[left[:, 2]], len(left)))


def _merge(peak, peak_error, height, error, z, beyond, queue, absorbed_by) -> None:
    """Work off the `queue` of insignificant saddles; `beyond` and `absorbed_by` are left as merging leaves them.

    The first four are lists of floats of the arrays' own type: that of Python would round differently.
    """

    def weak(end, s):
        return peak[end] - height[s] < z * (peak_error[end] + error[s])

    def margin(end, s):
        return (peak[end] - height[s]) / (peak_error[end] + error[s])

    heapq.heapify(queue)
    while queue:
        _, low, high, s = heapq.heappop(queue)
        if beyond[low].get(high) != s or not (weak(low, s) or weak(high, s)):
            continue  # since it was queued the saddle was moved, or a higher one took its place
        keep, drop = (high, low) if margin(low, s) < margin(high, s) else (low, high)
        absorbed_by[drop] = keep
        for other, moved in _rejoin(beyond, height, keep, drop):
            if weak(keep, moved) or weak(other, moved):
                heapq.heappush(queue, (-height[moved], min(keep, other), max(keep, other), moved))


def _rejoin(beyond, height, keep: int, drop: int):
    """Give the saddles of peak `drop` to peak `keep`; return those that stay: pairs of the peak beyond, the saddle."""
    moved, beyond[drop] = beyond[drop], {}
    del moved[keep], beyond[keep][drop]
    for other in moved:
        del beyond[other][drop]
    mine = beyond[keep]
    stay = [(other, s) for other, s in moved.items() if other not in mine or height[s] > height[mine[other]]]
    for other, s in stay:
        mine[other] = beyond[other][keep] = s
    return stay
