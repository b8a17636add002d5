"""`python -m sagecp` is `sagecp`."""

from sagecp.cli.main import main

if __name__ == "__main__":
    main(prog_name="sagecp")
