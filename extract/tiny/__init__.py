"""coldframe-tiny: a real, small CLIP in open_clip's own format that ships with the package.

It knows drawn shapes and nothing else. `make.py` made it; `RECORD.md` says how, and how good it is.
"""

from pathlib import Path

CONFIG = Path(__file__).with_name("coldframe-tiny.json")  # the stem is the model's name in open_clip
WEIGHTS = CONFIG.with_suffix(".safetensors")
