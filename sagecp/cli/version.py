"""`sagecp version`."""

from __future__ import annotations

import click

from sagecp.version import __version__


@click.command("version")
@click.option("--all", "everything", is_flag=True, help="Also of what it runs on.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="table or json.")
def version(everything: bool, output: str) -> None:
    """Print the version; with --all, also of Python and of the packages below."""
    versions = {"sagecp": __version__}
    if everything:
        import platform
        from importlib import metadata

        versions["python"] = platform.python_version()
        for name in ("grpcio", "protobuf", "uvloop", "aiohttp"):
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed"
    if output == "json":
        import json

        click.echo(json.dumps(versions))
    else:
        for name, value in versions.items():
            click.echo(f"{name} {value}")
