"""Where every test finds `processes`, which starts real ones."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
