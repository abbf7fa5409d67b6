"""Where a Chromium is: asked by the browser tests, and by the Makefile as ``python -m tests.report.browser``."""

from __future__ import annotations

import os
import shutil
import sys

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The path that DYNAMAX_CHROMIUM names, or the first of the known names on the PATH; None without any."""
    wanted = (os.environ.get("DYNAMAX_CHROMIUM"), *NAMES)
    return next((path for name in wanted if name and (path := shutil.which(name))), None)


if __name__ == "__main__":
    found = find_browser()
    print(found or "")
    sys.exit(0 if found else 1)
