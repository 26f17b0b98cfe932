"""`python -m fasttune` is the `fasttune` command."""

from fasttune.cli import app

app(prog_name="fasttune")
