"""A number as it was written, with the precision that its digits give it."""

from dataclasses import dataclass
from decimal import Decimal
from math import inf


@dataclass(frozen=True)
class Figure:
    """Half a unit of the last digit may be rounding."""

    value: float
    slack: float  # relative

    @classmethod
    def written(cls, text: str) -> "Figure":
        """Of digits with a decimal point; a ``~`` before them says nothing."""
        digits = Decimal(text.strip().lstrip("~"))
        exponent = digits.as_tuple().exponent
        if not isinstance(exponent, int):  # NaN and infinity have no digits
            return cls(float(digits), 0.0)
        half = Decimal((0, (5,), exponent - 1))
        return cls(float(digits), float(abs(half / digits)) if digits else inf)

    @classmethod
    def exact(cls, value: float) -> "Figure":
        return cls(value, 1e-6)

    def times(self, factor: float) -> "Figure":
        return Figure(self.value * factor, self.slack)

    def matches(self, other: float, slack: float = 0.0) -> bool:
        return abs(other - self.value) <= (self.slack + slack) * abs(self.value)
