"""`python -m hyperpod.shim`: a shim without a supervisor."""

import sys

from hyperpod.shim.main import main

sys.exit(main())
