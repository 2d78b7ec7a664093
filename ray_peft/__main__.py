"""`python -m ray_peft` is `ray-peft`."""

import sys

from ray_peft.cli import main

sys.exit(main())
