"""What all pages begin with: one file each that opens offline, under a policy that lets it load nothing."""

from __future__ import annotations

from html import escape
from importlib.resources import files


def opening(title: str, policy: str) -> str:
    """From the doctype to the opening of the body, with the style of the package. policy: the page's content security
    policy."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)} – fedkeel</title>
<style>
{own("page.css")}</style>
</head>
<body>"""


def own(name: str) -> str:
    """A text file of this room."""
    return files("fedkeel.report").joinpath(name).read_text(encoding="utf-8")
