"""A network behind a page."""

from pathlib import Path

PAGE = Path(__file__).parent / "page"
"""The folder of what a browser loads. Its `remote.js` or `local.js` is served as `restore.js`."""
