"""Studies: arms times seeds, each an ordinary run, and what they say together.

STUDY/runs/ARM/seed-K/  an ordinary run folder      STUDY/runs/ARM/seed-K.log  what it said
STUDY/results/ARM-seed-K.json  its result, once it is over
STUDY/{runs,arms,epochs}.csv  STUDY/summary.json  all results so far      STUDY/commands.txt
"""

from lm.study.plan import Arm, Job, Study, read
from lm.study.results import SUMMARY
from lm.study.runner import run
from lm.study.statistics import sign_test, summarize, table

__all__ = ["SUMMARY", "Arm", "Job", "Study", "read", "run", "sign_test", "summarize", "table"]
