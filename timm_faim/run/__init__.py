"""What any command needs: errors, files that are whole or not there, locks, records and weights of a run."""
