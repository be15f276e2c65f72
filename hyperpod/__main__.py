"""`python -m hyperpod` is the `hyperpod` command."""

import sys

from hyperpod.cli.main import main

sys.exit(main())
