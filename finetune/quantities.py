"""Logged quantities as people read them: 1.2k, 5.3 GB, 2h 04m. For lines, tables and charts; files keep exact numbers.

NaN and infinities are shown, not hidden: a loss of nan is what somebody must see.
"""

import math
import numbers
from typing import Any, TypeGuard

COUNT_SUFFIXES = ("", "k", "M", "B", "T")
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a log is a number to show: Python's or NumPy's, NaN and infinities too, but no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def format_count(value: float) -> str:
    """Of things or things per second: 0.42, 3.1, 950, 1.2k, 12.3k, 123k, 9.7B."""
    if not math.isfinite(value):
        return f"{value:g}"
    if float(value).is_integer() and abs(value) < 1000:
        return str(int(value))
    if 0 < abs(value) < 1:
        return f"{value:.2g}"
    scaled, suffix = _scale(value, COUNT_SUFFIXES)
    decimals = 0 if abs(scaled) >= 99.95 or (not suffix and abs(scaled) >= 9.95) else 1
    return f"{scaled:.{decimals}f}{suffix}"


def format_bytes(value: float) -> str:
    """512 B, 5.3 GB: powers of 1000, as drives and downloads are measured."""
    if not math.isfinite(value):
        return f"{value:g} B"
    scaled, unit = _scale(value, BYTE_UNITS)
    return f"{scaled:.{0 if unit == 'B' or abs(scaled) >= 99.95 else 1}f} {unit}"


def format_duration(seconds: float) -> str:
    """45s, 12m 05s, 2h 04m, 3d 04h: the two largest units, the rest cut off."""
    if not math.isfinite(seconds):
        return f"{seconds:g}s"
    total = max(0, int(seconds))
    days, hours, minutes, rest = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {rest:02d}s"
    return f"{rest}s"


def format_loss(value: float) -> str:
    """A loss, metric or gradient norm: four decimals, 1.2345; what those cannot show as 1.23e-05 or 1.23e+06."""
    if math.isfinite(value) and (0 < abs(value) < 0.001 or abs(value) >= 1e5):
        return f"{value:.2e}"
    return f"{value:.4f}"


def format_learning_rate(value: float) -> str:
    """1.00e-04; 0 where a schedule begins or ends there."""
    return f"{value:.2e}" if value else "0"


def _scale(value: float, units: tuple[str, ...]) -> tuple[float, str]:
    """The value in the largest unit that it fills, as it will be rounded: 999 950 is 1.0M, not 1000k."""
    scaled = float(value)
    for unit in units:
        if abs(scaled) < 999.5 or unit == units[-1]:
            break
        scaled /= 1000
    return scaled, unit
