"""``python -m aimet_ext`` is ``aimet-ext``."""

from aimet_ext.cli.app import main

if __name__ == "__main__":
    main()
