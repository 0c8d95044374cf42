"""What people type: the `rsft` command, one file for each group."""
