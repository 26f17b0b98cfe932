"""What has to hold before a shortcut is taken, checked on the modules that are really there."""
