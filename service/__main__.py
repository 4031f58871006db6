# SPDX-License-Identifier: Apache-2.0
"""`python -m service` is `warmfleet`."""

from service.cli import main

if __name__ == "__main__":
    main()
