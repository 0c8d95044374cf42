"""What people type: the `rsft` command."""
