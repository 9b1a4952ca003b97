"""`python -m gradkernels`."""

import sys

from gradkernels.cli import main

sys.exit(main())
