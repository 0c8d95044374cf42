"""What people type: the `rsft` command."""

import sys


def rsft() -> None:
    """Entry point: a Ctrl-C while the command is still being loaded ends it without a traceback."""
    try:
        from cli.main import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()
