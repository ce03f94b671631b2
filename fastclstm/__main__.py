"""``python -m fastclstm``."""

from fastclstm.commands import main

if __name__ == "__main__":
    main()
