"""What each dashboard shows."""

from boards.fleet import FLEET
from boards.gpus import GPUS
from boards.overview import OVERVIEW
from boards.queue import QUEUE
from boards.slo import SLO

DASHBOARDS = (OVERVIEW, FLEET, QUEUE, SLO, GPUS)
