"""``python -m fastclstm``."""

from fastclstm.cli import main

if __name__ == "__main__":
    main()
