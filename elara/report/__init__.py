"""What came out of runs, for eyes: pictures, tables of sweeps, a page to send around."""
