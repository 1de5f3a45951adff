"""Make the picture of the page on reports: the upper part of a run's page, in Chromium.

Run: python benchmarks/report_picture.py FOLDER/report.html docs/images/report.png
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import tempfile


def main() -> None:
    """Draw the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("picture", type=pathlib.Path)
    parser.add_argument("--height", type=int, default=1040)
    options = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("chromium is required, and is not installed")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
        light = "--blink-settings=preferredColorScheme=1"
        size = f"--window-size=960,{options.height}"
        shot = f"--screenshot={options.picture.resolve()}"
        command = [program, *flags, light, size, shot, f"--user-data-dir={profile}"]
        subprocess.run([*command, options.page.resolve().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
