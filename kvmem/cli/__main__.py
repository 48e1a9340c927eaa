"""`python -m kvmem.cli` is the kvmem command."""

from kvmem.cli import main

if __name__ == "__main__":
    main()
