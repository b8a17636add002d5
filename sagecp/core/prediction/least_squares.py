"""Recursive least squares that follows slow change without forgetting what it no longer sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

# Below this, the features lie in a direction that is known exactly, up to rounding.
_LEAST_VARIANCE = 1e-12


class RecursiveLeastSquares:
    """Estimates ``c`` in ``y = x . c + noise`` from one observation at a time.

    Gain and covariance follow the textbook form (Haykin, "Adaptive Filter
    Theory", chapter on RLS; Ljung, "System Identification", section 11.2). It
    forgets only along the direction of each observation (Kulhavy, "Restricted
    exponential forgetting in real-time identification", Automatica 23(5),
    1987): what is not observed stays known, so the covariance cannot wind up
    during hours of decodes without a prefill. As a second bound no variance
    exceeds the initial one.

    Noise has unit variance: divide features and innovation by the noise's
    standard deviation, or give the initial variance in units of its square.

    Args:
        coefficients: Initial estimate.
        initial_variance: Of each coefficient; they start uncorrelated.
        forgetting: Weight left to old observations by each new one, in (0, 1],
            where the observations differ in every direction.
        lower: Least value of every coefficient.
        upper: Largest value of every coefficient.
    """

    __slots__ = ("_forgotten_share", "_initial_variance", "_lower", "_rows", "_upper", "coefficients")

    def __init__(
        self,
        coefficients: Sequence[float],
        *,
        initial_variance: float,
        forgetting: float,
        lower: float,
        upper: float,
    ) -> None:
        if not 0.0 < forgetting <= 1.0:
            raise ValueError(f"forgetting is {forgetting}; it must be above 0 and at most 1")
        if not (math.isfinite(initial_variance) and initial_variance > 0.0):
            raise ValueError(f"initial_variance is {initial_variance}; it must be finite and above 0")
        size = len(coefficients)
        self.coefficients = list(coefficients)
        self._initial_variance = initial_variance
        # Observations in all directions together forget as fast as plain
        # forgetting would: then x'Px, too, settles at size * (1 - forgetting).
        self._forgotten_share = 1.0 - forgetting**size
        self._lower = lower
        self._upper = upper
        self._rows = [
            [initial_variance if row == column else 0.0 for column in range(size)] for row in range(size)
        ]

    def update(self, features: Sequence[float], innovation: float, weight: float = 1.0) -> None:
        """Take in one observation.

        Args:
            features: ``x``, finite and of the size of the coefficients.
            innovation: ``y - x . c``.
            weight: In (0, 1]: how much of an ordinary observation it counts for,
                in what it teaches and in what it makes forgotten.
        """
        rows = self._rows
        projected = [sum(map(mul, row, features)) for row in rows]
        variance = sum(map(mul, projected, features))
        if not variance > _LEAST_VARIANCE:
            return
        forgotten = self._forgotten_share * weight
        divisor = 1.0 - forgotten + weight * variance
        gain = weight * innovation / divisor
        lower, upper = self._lower, self._upper
        self.coefficients = [
            min(upper, max(lower, coefficient + gain * part))
            for coefficient, part in zip(self.coefficients, projected, strict=True)
        ]
        # Information along x grows by the weight, less the forgotten share of
        # the 1/variance that was there. Negative: more is forgotten than learned.
        change = (weight - forgotten / variance) / divisor
        # The product of two parts is the same in either order, to the last bit:
        # the matrix stays exactly symmetric.
        self._rows = [
            [value - change * (part * other) for value, other in zip(row, projected, strict=True)]
            for row, part in zip(rows, projected, strict=True)
        ]
        if change < 0.0:
            self._bound_variances()

    def _bound_variances(self) -> None:
        rows, limit = self._rows, self._initial_variance
        for index, row in enumerate(rows):
            if row[index] > limit:
                # Row and column alike, which keeps the matrix positive definite.
                scale = math.sqrt(limit / row[index])
                for other in rows:
                    other[index] *= scale
                rows[index] = [value * scale for value in rows[index]]
