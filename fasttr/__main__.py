"""`python -m fasttr COMMAND`: the command `fasttr`, also under torchrun."""

from fasttr.cli import main

if __name__ == "__main__":
    main()
