"""The command line of a checkout: `python cli.py …` is `distill …` without installing anything."""

from pipeline.commands import main

if __name__ == "__main__":
    main()
