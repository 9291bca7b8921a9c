import sys
from pathlib import Path

# benchmarks/ is not installed. Last on the path, so that the packages beside it are still the installed ones.
sys.path.append(str(Path(__file__).resolve().parents[2]))
