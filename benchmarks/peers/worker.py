"""The script that each side's interpreter runs: ``worker.py JOB``, see ``protocol.serve``."""

import json
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
# Python puts a script's folder first: there "purejaxrl" would be the adapter instead of the library.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here] + [str(here.parent)]

from peers import protocol

protocol.serve(json.loads(sys.argv[1]))
