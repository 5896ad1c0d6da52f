"""`python -m gadcli`: the same as `gad`."""

from gadcli.cli.app import main

if __name__ == "__main__":
    main()
