"""Named sets of head options."""

from typing import Any

# "indicatrix" is what benchmarks/accuracy found best and what FAIMHead is without options; "founding" starts as the
# founding code does.
PRESETS: dict[str, dict[str, Any]] = {
    "indicatrix": {},
    "flat": {
        "space": "flat", "full_sigma": False, "learn_metric": True, "lambda_init": 0.1, "scale_init": 10.0,
        "margin": 0.0,
    },
}  # fmt: skip
PRESETS["founding"] = PRESETS["flat"] | {"init": "seed"}
DEFAULT_PRESET = "indicatrix"
