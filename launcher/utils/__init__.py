"""What belongs to no subject: text, files, limits of the machine, secrets."""
